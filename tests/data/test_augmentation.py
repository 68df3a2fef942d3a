"""Ground truth through the augmentations of the config, against a loop over ids and pixels."""

import random

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from panoptic_fpn_ext import PanopticFPNMapper, UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.data.augmentation import build_augmentation
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png

from .test_targets import random_panoptic
from .tiny_dataset import CAR, PERSON, SIZE, TinyDataset

CROPS = [
    ("relative", (0.5, 0.6)),
    ("relative_range", (0.3, 0.3)),
    ("absolute", (10, 14)),
    ("absolute_range", (6, 20)),
    ("absolute", (500, 500)),
]


def config(name: str = "tiny", *options):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = (name,)
    cfg.INPUT.MIN_SIZE_TRAIN = (12, 40)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.merge_from_list(list(options))
    return cfg


def crop(crop_type, size, *, after_resize=False, hold=0.0) -> list:
    return [
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", crop_type, "INPUT.CROP.SIZE", list(size)),
        *("INPUT.CROP.AFTER_RESIZE", after_resize, "INPUT.CROP.HOLD_INSTANCE", hold),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = TinyDataset(tmp_path_factory.mktemp("tiny") / "data", 1)
    return data


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cropped=st.sampled_from([None, *CROPS]),
    after_resize=st.booleans(),
    hold=st.sampled_from([0.0, 1.0]),
    flip=st.sampled_from(["none", "horizontal", "vertical"]),
    color=st.booleans(),
    label_space=st.sampled_from(["separated", "full"]),
)
def test_the_whole_mapper_equals_a_loop(
    data, seed, cropped, after_resize, hold, flip, color, label_space
):
    ids, segments_info = random_panoptic(seed)
    png, image = data.root / "any.png", data.root / "any_image.png"
    write_panoptic_png(png, ids)
    write_panoptic_png(image, ids)
    record = {
        "file_name": str(image),
        "image_id": 1,
        "height": ids.shape[0],
        "width": ids.shape[1],
        "pan_seg_file_name": str(png),
        "segments_info": segments_info,
    }
    things = dict.fromkeys(range(3), 0) if label_space == "separated" else {0: 3, 1: 4, 2: 5}
    options = ["INPUT.RANDOM_FLIP", flip, "INPUT.COLOR_AUG_SSD", color]
    options += crop(*cropped, after_resize=after_resize, hold=hold) if cropped else []
    cfg = config("tiny", *options)
    mapper = PanopticFPNMapper(
        is_train=True,
        thing_sem_seg_ids=things,
        ignore_label=255,
        augmentations=(augmentations := _Recorded(build_augmentation(cfg, True))).steps,
        image_format="RGB",
        use_instance_mask=True,
    )
    np.random.seed(seed % 2**32)
    mapped = mapper(record)

    # Where each pixel comes from: through the same transforms, as an image of row and column.
    rows, columns = np.indices(ids.shape, dtype=np.uint8)
    transforms = T.TransformList(augmentations.used)
    rows, columns = (
        transforms.apply_segmentation(np.ascontiguousarray(a)) for a in (rows, columns)
    )
    ids = ids[rows, columns]
    assert mapped["image"].shape[1:] == mapped["sem_seg"].shape == ids.shape
    infos = {info["id"]: info for info in segments_info}
    expected = np.full(ids.shape, 255)
    masks = {}
    for (y, x), i in np.ndenumerate(ids):
        if i:
            info = infos[int(i)]
            category = info["category_id"]
            expected[y, x] = things[category] if info["isthing"] else category
            if info["isthing"] and not info["iscrowd"]:
                masks.setdefault(int(i), np.zeros(ids.shape, bool))[y, x] = True
    np.testing.assert_array_equal(mapped["sem_seg"], expected)
    instances = mapped["instances"]
    kept = [info for info in segments_info if info["id"] in masks]
    assert instances.gt_classes.tolist() == [info["category_id"] for info in kept]
    for k, info in enumerate(kept):
        mask = masks[info["id"]]
        ys, xs = np.nonzero(mask)
        assert torch.equal(instances.gt_masks.tensor[k], torch.from_numpy(mask))
        assert instances.gt_boxes.tensor[k].tolist() == [
            *(xs.min(), ys.min()),
            *(xs.max() + 1, ys.max() + 1),
        ]


class _Recorded:
    """Augmentations that note the transforms they draw."""

    def __init__(self, augmentations):
        self.used = []
        self.steps = [self._noting(T.augmentation._transform_to_aug(a)) for a in augmentations]

    def _noting(self, augmentation):
        recorded = self.used

        class Noting(T.Augmentation):
            def __call__(self, aug_input):
                transform = augmentation(aug_input)
                recorded.append(transform)
                return transform

        return Noting()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cropped=st.sampled_from([*CROPS[:4], ("absolute", (4, 5))]),
    after_resize=st.booleans(),
)
def test_a_crop_holds_an_instance_if_there_is_one(data, seed, cropped, after_resize):
    ids = np.zeros((40, 60), int)
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, 30), rng.integers(0, 50)
    ids[y : y + 4, x : x + 5] = CAR
    ids[y, x] = 0
    write_panoptic_png(data.root / "hold.png", ids)
    record = {
        "file_name": str(data.root / "hold.png"),
        "image_id": 1,
        "height": 40,
        "width": 60,
        "pan_seg_file_name": str(data.root / "hold.png"),
        "segments_info": [{"id": CAR, "category_id": 0, "isthing": True, "iscrowd": 0}],
    }
    cfg = config("tiny", *crop(*cropped, after_resize=after_resize, hold=1.0))
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    mapper = _mapper(cfg)
    np.random.seed(seed % 2**32)
    instances = mapper(record)["instances"]
    assert len(instances) == 1
    height, width = cropped[1] if cropped[0] == "absolute" else (0, 0)
    if after_resize and height >= 4 and width >= 5:
        assert instances.gt_masks.tensor.sum() == 19
    # None to hold: any crop will do.
    record["segments_info"][0]["iscrowd"] = 1
    assert len(mapper(record)["instances"]) == 0


def _mapper(cfg):
    mapper = PanopticFPNMapper(
        is_train=True,
        thing_sem_seg_ids={0: 0, 1: 0},
        ignore_label=255,
        augmentations=build_augmentation(cfg, True),
        image_format="RGB",
        use_instance_mask=True,
    )
    return mapper


def test_a_crop_after_the_resize_has_its_size(data):
    with data.registered() as name:
        cfg = config(name, *crop("absolute", (10, 14), after_resize=True))
        mapper = PanopticFPNMapper(cfg, is_train=True)
        (record,) = DatasetCatalog.get(name)
        for _ in range(5):
            assert mapper(record)["sem_seg"].shape == (10, 14)


def test_colours_change_and_shapes_do_not(data):
    with data.registered() as name:
        (record,) = DatasetCatalog.get(name)
        plain = config(name, "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", "(24,)")
        plain.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        expected = PanopticFPNMapper(plain, is_train=True)(record)
        plain.INPUT.COLOR_AUG_SSD = True
        mapper = PanopticFPNMapper(plain, is_train=True)
        mapped = [mapper(record) for _ in range(8)]
        assert any(not torch.equal(m["image"], expected["image"]) for m in mapped)
        assert all(torch.equal(m["sem_seg"], expected["sem_seg"]) for m in mapped)
        test_mapper = PanopticFPNMapper(plain, is_train=False)
        assert torch.equal(test_mapper(record)["image"], test_mapper(record)["image"])


def test_colours_change_alike_in_both_channel_orders(data):
    images = []
    with data.registered() as name:
        (record,) = DatasetCatalog.get(name)
        for image_format in ("BGR", "RGB"):
            mapper = PanopticFPNMapper(
                config(name, "INPUT.COLOR_AUG_SSD", True, "INPUT.FORMAT", image_format)
            )
            random.seed(0)
            np.random.seed(0)
            images.append([mapper(record)["image"] for _ in range(8)])
    for bgr, rgb in zip(*images, strict=True):
        assert torch.equal(bgr, rgb.flip(0))


@pytest.mark.parametrize(
    ("crop_type", "size"), [("relative", (1.0, 1.0)), ("absolute_range", (7, 7)), *CROPS]
)
def test_crops_that_are_allowed(crop_type, size):
    augmentations = build_augmentation(config("tiny", *crop(crop_type, size)), is_train=True)
    assert isinstance(augmentations[0], T.RandomCrop)


@pytest.mark.parametrize("cropped", CROPS)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("segmentation", ["polygon", "rle", "uncompressed rle"])
def test_instances_of_a_json_are_cropped_as_those_of_the_png(
    data, cropped, mask_format, segmentation
):
    """The tiny dataset's rectangles are the same in both; so are boxes, tight after a crop."""
    for annotation in data.instances["annotations"]:
        x, y, w, h = (int(v) for v in annotation["bbox"])
        mask = np.zeros(SIZE, np.uint8)
        mask[y : y + h, x : x + w] = 1
        encoded = rle.encode(np.asfortranarray(mask))
        annotation["segmentation"] = {
            "polygon": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            "rle": {"size": encoded["size"], "counts": encoded["counts"].decode()},
            "uncompressed rle": _uncompressed(mask),
        }[segmentation]
    data.write()
    options = [*crop(*cropped), "INPUT.MASK_FORMAT", mask_format, "INPUT.RANDOM_FLIP", "horizontal"]
    with data.registered(instances=True) as name:
        (record,) = DatasetCatalog.get(name)
        cfg = config(name, *options, "INPUT.MIN_SIZE_TRAIN", "(24,)")
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        mapper = PanopticFPNMapper(cfg, is_train=True)
        without = {k: v for k, v in record.items() if k != "annotations"}
        for seed in range(6):
            results = []
            for each in (record, without):
                np.random.seed(seed)
                results.append(mapper(each)["instances"])
            of_json, of_png = results
            assert sorted(of_json.gt_classes.tolist()) == sorted(of_png.gt_classes.tolist())
            if of_png.image_size == SIZE or cropped[0] == "absolute":
                boxes = dict(zip(*_classes_and_boxes(of_json), strict=True))
                for category, box in zip(*_classes_and_boxes(of_png), strict=True):
                    assert (boxes[category] - box).abs().max() <= 1


def _classes_and_boxes(instances):
    return instances.gt_classes.tolist(), instances.gt_boxes.tensor


def _uncompressed(mask: np.ndarray) -> dict:
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(np.concatenate(([0], ends, [flat.size])))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def test_polygons_stay_polygons_only_where_they_can(data):
    with data.registered(instances=True) as name:
        (record,) = DatasetCatalog.get(name)
        cfg = config(name, "INPUT.MASK_FORMAT", "polygon")
        polygons = [[2, 4, 10, 4, 10, 12, 2, 12]]
        record["annotations"] = [{**record["annotations"][0], "segmentation": polygons}]
        mapper = PanopticFPNMapper(cfg, is_train=True)
        assert isinstance(mapper(record)["instances"].gt_masks, PolygonMasks)
        assert record["annotations"][0]["segmentation"] == polygons
        mask = np.asfortranarray(read_panoptic_png(record["pan_seg_file_name"]) == PERSON)
        other = {**record["annotations"][0], "segmentation": rle.encode(mask.astype(np.uint8))}
        mixed = {**record, "annotations": [*record["annotations"], other]}
        assert isinstance(mapper(mixed)["instances"].gt_masks, BitMasks)
        small = {**other, "segmentation": mask[1:]}
        with pytest.raises(
            UserError, match=r"1\.jpg: the mask of an instance annotation is not of"
        ):
            mapper({**record, "annotations": [small]})
        none = {k: v for k, v in other.items() if k != "segmentation"}
        with pytest.raises(UserError, match=r"1\.jpg: an instance annotation has no 'segm"):
            mapper({**record, "annotations": [none]})
        cfg.MODEL.MASK_ON = False
        instances = PanopticFPNMapper(cfg, is_train=True)({**record, "annotations": [none]})
        assert not instances["instances"].has("gt_masks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (crop("square", (1, 1)), "INPUT.CROP.TYPE 'square': allowed are"),
        (crop("relative", (0.0, 1.0)), r"INPUT.CROP.SIZE \[0.0, 1.0\]: 'relative' crops take two"),
        (crop("absolute", (0.5, 0.5)), r"INPUT.CROP.SIZE .* take two numbers of pixels"),
        (crop("absolute_range", (9, 4)), r"'absolute_range' takes \(least, greatest\)"),
        (crop("absolute", (9, 9), hold=1.5), "INPUT.CROP.HOLD_INSTANCE 1.5: a probability"),
        (["INPUT.COLOR_AUG_SSD", True, "INPUT.FORMAT", "L"], "INPUT.COLOR_AUG_SSD needs .*RGB"),
    ],
)
def test_mistakes_in_the_config_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        build_augmentation(config("tiny", *options), is_train=True)
