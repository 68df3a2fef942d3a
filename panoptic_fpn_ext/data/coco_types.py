"""The two JSON formats of COCO as types, by which msgspec decodes and checks them in one go.

The formats: https://cocodataset.org/#format-data. A field that is not here may be anything.
"""

from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta, Raw, Struct

MAX_SEGMENT_ID = 2**24 - 1

Id = int | Annotated[str, Meta(min_length=1)]
Name = Annotated[str, Meta(min_length=1)]
Size = Annotated[int, Meta(gt=0)]
Flag = Literal[0, 1] | bool
Color = Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(min_length=3, max_length=3)]
SegmentId = Annotated[int, Meta(ge=1, le=MAX_SEGMENT_ID)]
Number = Annotated[float, Meta(gt=-1e9, lt=1e9)]
Box = Annotated[list[Number], Meta(min_length=4, max_length=4)]
Polygons = list[list[Number]]


class RLE(TypedDict):
    size: Any
    counts: Any


class Segment(Struct, gc=False):
    id: SegmentId
    category_id: int
    iscrowd: Flag = 0


class Image(Struct, gc=False):
    id: Id
    file_name: Name
    height: Size
    width: Size


class Annotation(Struct, gc=False):
    """The segments of an image, in a panoptic JSON."""

    image_id: Id
    file_name: Name
    segments_info: list[Segment]


class Instance(Struct, gc=False):
    """An annotation of a JSON of instances."""

    image_id: Id
    category_id: int
    bbox: Box
    iscrowd: Flag = 0
    segmentation: Polygons | RLE = None
    keypoints: list[Number] = None


class WithId(Struct, gc=False):
    id: Id


class Content(Struct, gc=False):
    """Either JSON, its entries not decoded yet."""

    images: list[Raw]
    annotations: list[Raw]
    categories: Any = None


class Categories(Struct, gc=False):
    categories: Any = None
