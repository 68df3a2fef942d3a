"""Targets of both branches against naive loops."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.targets import (
    index_segments,
    instances_from_index,
    sem_seg_from_index,
    sem_seg_from_panoptic,
    transform_index,
)

THING_SEM_SEG_IDS = (0, 0, 0)
FULL_THING_SEM_SEG_IDS = (3, 4, 5)


def random_panoptic(seed: int) -> tuple[np.ndarray, list[dict]]:
    """A map of up to 12 segments in blocks, with void, crowds and ids up to 2^24."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(2**24 - 1, size=rng.integers(1, 12), replace=False) + 1
    segments_info = [
        {
            "id": int(i),
            "isthing": bool(isthing := rng.random() < 0.6),
            "category_id": int(rng.integers(0, 3)),
            "iscrowd": int(isthing and rng.random() < 0.3),
        }
        for i in ids
    ]
    blocks = rng.choice(np.append(ids, 0), size=(6, 8))
    return blocks.repeat(3, axis=0).repeat(2, axis=1).astype(np.int32), segments_info


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([THING_SEM_SEG_IDS, FULL_THING_SEM_SEG_IDS]))
def test_sem_seg_equals_a_loop(seed, thing_sem_seg_ids):
    ids, segments_info = random_panoptic(seed)
    expected = np.full(ids.shape, 255)
    for y in range(ids.shape[0]):
        for x in range(ids.shape[1]):
            for info in segments_info:
                if ids[y, x] == info["id"]:
                    category = info["category_id"]
                    expected[y, x] = thing_sem_seg_ids[category] if info["isthing"] else category
    sem_seg = sem_seg_from_panoptic(
        ids, segments_info, thing_sem_seg_ids=thing_sem_seg_ids, ignore_label=255
    )
    assert sem_seg.dtype == np.uint8
    np.testing.assert_array_equal(sem_seg, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([np.int32, np.int64]))
def test_index_equals_a_loop(seed, dtype):
    ids, segments_info = random_panoptic(seed)
    expected = np.zeros(ids.shape, dtype=int)
    for k, info in enumerate(segments_info):
        expected[ids == info["id"]] = k + 1
    index = index_segments(ids.astype(dtype), segments_info, source="")
    assert index.dtype == np.uint8
    np.testing.assert_array_equal(index, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.data())
def test_the_least_id_without_a_segment_is_named(seed, data):
    ids, segments_info = random_panoptic(seed)
    lost = data.draw(st.sets(st.sampled_from([info["id"] for info in segments_info]), min_size=1))
    left = [info for info in segments_info if info["id"] not in lost]
    missing = sorted(lost & set(ids.reshape(-1).tolist()))
    if missing:
        with pytest.raises(UserError, match=rf"^a\.png: segment id {missing[0]} is not"):
            index_segments(ids, left, source="a.png")
    else:
        index_segments(ids, left, source="a.png")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_instances_equal_a_loop(seed):
    ids, segments_info = random_panoptic(seed)
    expected = []
    for info in segments_info:
        mask = ids == info["id"]
        if info["isthing"] and not info["iscrowd"] and mask.any():
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            expected.append((info["category_id"], box, mask))
    instances = instances_from_index(index_segments(ids, segments_info, source=""), segments_info)
    assert len(instances) == len(expected)
    assert instances.gt_boxes.tensor.shape == (len(expected), 4)
    for k, (category, box, mask) in enumerate(expected):
        assert instances.gt_classes[k] == category
        assert instances.gt_boxes.tensor[k].tolist() == box
        assert torch.equal(instances.gt_masks.tensor[k], torch.from_numpy(mask))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.integers(10, 40), st.integers(10, 40))
def test_transforms_act_as_on_a_semantic_map(seed, flip, height, width):
    """Flip, resize and crop: the same pixels as Detectron2 picks for a semantic map."""
    ids, segments_info = random_panoptic(seed)
    h, w = ids.shape
    transforms = T.TransformList(
        [T.ResizeTransform(h, w, height, width), T.CropTransform(2, 3, width - 4, height - 5)]
        + ([T.HFlipTransform(width - 4)] if flip else [])
    )
    arguments = {"thing_sem_seg_ids": THING_SEM_SEG_IDS, "ignore_label": 255}
    sem_seg = sem_seg_from_panoptic(ids, segments_info, **arguments)
    expected = transforms.apply_segmentation(sem_seg)

    index = transform_index(index_segments(ids, segments_info, source=""), transforms)
    ids_after = np.array([0] + [s["id"] for s in segments_info])[index]
    actual = sem_seg_from_panoptic(ids_after, segments_info, **arguments)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("padding", [0, 255])
def test_padding_is_void(padding):
    index = np.ones((4, 4), dtype=np.uint8)
    transforms = T.TransformList([T.PadTransform(2, 2, 2, 2, pad_value=padding)])
    padded = transform_index(index, transforms)
    segments_info = [{"id": 1, "isthing": True, "category_id": 0}]
    sem_seg = sem_seg_from_index(padded, segments_info, thing_sem_seg_ids=(0,), ignore_label=255)
    assert (sem_seg == 0).sum() == 16
    assert sem_seg[0, 0] == 255
    assert instances_from_index(padded, segments_info).gt_boxes.tensor.tolist() == [[2, 2, 6, 6]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([254, 255, 256, 1000]), st.sampled_from([0, 255]))
def test_as_many_segments_as_a_byte_holds_and_more(seed, num_segments, padding):
    """Through resize, flip and padding: the pixels of small maps that have the same segments."""
    rng = np.random.default_rng(seed)
    segments_info = [
        {"id": k + 1, "isthing": k % 2 == 0, "category_id": k % 3} for k in range(num_segments)
    ]
    ids = rng.integers(0, num_segments + 1, (20, 30))
    ids[:3, :3] = num_segments
    transforms = T.TransformList(
        [
            T.ResizeTransform(20, 30, 33, 17),
            T.HFlipTransform(17),
            T.PadTransform(1, 2, 3, 4, pad_value=padding),
        ]
    )
    index = index_segments(ids, segments_info, source="")
    # 255 is what Detectron2 pads semantic maps with.
    assert index.dtype == (np.uint8 if num_segments < 255 else np.uint16)
    index = transform_index(index, transforms)
    moved = T.TransformList(transforms.transforms[:2])
    parts = [moved.apply_segmentation(((ids >> shift) & 255).astype(np.uint8)) for shift in (0, 8)]
    expected = np.pad(parts[0] + 256 * parts[1].astype(int), ((2, 4), (1, 3)))
    sem_seg = sem_seg_from_index(
        index, segments_info, thing_sem_seg_ids=(3, 4, 5), ignore_label=255
    )
    k = expected - 1
    np.testing.assert_array_equal(
        sem_seg, np.where(k < 0, 255, np.where(k % 2 == 0, 3 + k % 3, k % 3))
    )
    instances = instances_from_index(index, segments_info)
    assert len(instances) == len(np.unique(expected[(k >= 0) & (k % 2 == 0)]))


def test_as_many_segments_as_two_bytes_hold():
    """The greatest of their values is what Detectron2 pads both bytes with: void."""
    segments_info = [{"id": k + 1, "isthing": True, "category_id": 0} for k in range(2**16 - 2)]
    ids = np.array([[0, 1, 40_000, 2**16 - 2]])
    index = index_segments(ids, segments_info, source="a.png")
    assert index.tolist() == ids.tolist()
    masks = instances_from_index(index, segments_info).gt_masks.tensor
    assert masks.tolist() == [[[False, k == 0, k == 1, k == 2]] for k in range(3)]
    with pytest.raises(UserError, match=r"a\.png: 65535 segments, at most 65534"):
        index_segments(ids, [*segments_info, {"id": 2**16 - 1}], source="a.png")


def test_an_id_without_a_segment_is_an_error_that_names_file_and_id():
    with pytest.raises(UserError, match=r"a\.png: segment id 7 is not in segments_info"):
        index_segments(np.full((2, 2), 7), [{"id": 8}], source="a.png")


@pytest.mark.parametrize("num_segments", [3, 300])
def test_masks_of_a_flipped_read_only_map(num_segments):
    segments_info = [{"id": k + 1, "isthing": True, "category_id": 0} for k in range(num_segments)]
    ids = np.arange(num_segments + 1).repeat(2).reshape(-1, 2)
    index = np.flip(index_segments(ids, segments_info, source=""))
    index.flags.writeable = False
    masks = instances_from_index(index, segments_info).gt_masks.tensor.numpy()
    np.testing.assert_array_equal(masks, [index == k + 1 for k in range(num_segments)])


def test_no_instances_have_the_shapes_detectron2_wants():
    instances = instances_from_index(np.zeros((5, 6), dtype=np.uint8), [])
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_masks.tensor.shape == (0, 5, 6)
    assert instances.gt_classes.dtype == torch.int64
