"""The files that Detectron2's own mapper and evaluators want, made when they are opened.

A semantic map for each image (here) and a JSON of instances for a dataset without one
(:mod:`~panoptic_fpn_ext.evaluation.detectron2_evaluators`) are in the panoptic PNGs already. They
get names that Detectron2's ``PathManager`` opens; nothing is converted on disk.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from .panoptic_png import read_panoptic_png
from .targets import sem_seg_from_panoptic

SEM_SEG_PREFIX = "panoptic-sem-seg://"
INSTANCES_PREFIX = "panoptic-instances://"
VOID = 255


class VirtualName(str):
    """One that is opened here: a process that gets it in a record imports this module by that.

    From Python 3.14 on loaders start their processes afresh, with nothing registered.
    """

    __slots__ = ()


def sem_seg_file_name(
    png: str, segments_info: Iterable[Mapping[str, Any]], thing_sem_seg_ids: Mapping[int, int]
) -> VirtualName:
    """A name for the semantic map of a panoptic PNG, which says how to make it.

    Args:
        png: the panoptic PNG.
        segments_info: its segments, category ids contiguous.
        thing_sem_seg_ids: thing category -> semantic class.
    """
    classes = ",".join(
        f"{s['id']}={thing_sem_seg_ids[s['category_id']] if s['isthing'] else s['category_id']}"
        for s in segments_info
    )
    return VirtualName(f"{SEM_SEG_PREFIX}{classes}/{png}")


class SemSegHandler(PathHandler):
    """Opens names of :func:`sem_seg_file_name`: 8-bit grey images of labels, void 255."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SEM_SEG_PREFIX]

    def _open(self, path: str, mode: str = "rb", buffering: int = -1, **kwargs: Any) -> io.BytesIO:
        classes, _, png = path.removeprefix(SEM_SEG_PREFIX).partition("/")
        pairs = [pair.split("=") for pair in classes.split(",") if pair]
        segments_info = [{"id": int(i), "category_id": int(c), "isthing": False} for i, c in pairs]
        sem_seg = sem_seg_from_panoptic(
            read_panoptic_png(png),
            segments_info,
            thing_sem_seg_ids={},
            ignore_label=VOID,
            source=png,
        )
        height, width = sem_seg.shape
        # As PGM, which costs nothing to write and to read.
        return io.BytesIO(b"P5 %d %d 255\n" % (width, height) + sem_seg.tobytes())


PathManager.register_handler(SemSegHandler())
