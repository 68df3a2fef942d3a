"""Everything after the network against the plain path: Detectron2's own ``PanopticFPN``, whose
network is replaced, as ours is, by one that returns what a test has drawn."""

import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.layers import ShapeSpec, paste_masks_in_image
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch.panoptic_fpn import (
    PanopticFPN,
    combine_semantic_and_instance_outputs,
)
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from panoptic_fpn_ext.modeling import SemanticFPNHead
from panoptic_fpn_ext.modeling.meta_arch.panoptic_fpn import PanopticFPNExt
from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor  # noqa: F401  (below)

from ..conftest import CPU, REPOSITORY

STRIDE = 4
NUM_CLASSES = 5
OUTPUTS = ("sem_seg", "instances", "panoptic_seg")
# What rounding may do to the logits and to a pixel of a mask; ties are decided within it.
ROUNDING = 1e-4
MASK_ROUNDING = 1e-4


class Image(NamedTuple):
    """An image's size, the size of its outputs (none: the same) and what ROI heads find in it."""

    image_size: tuple[int, int]
    size: tuple[int, int] | None
    boxes: torch.Tensor  # (N, 4)
    masks: torch.Tensor  # (N, 1, M, M)
    scores: torch.Tensor  # (N,)

    def instances(self) -> Instances:
        # A copy: postprocessing scales boxes in place.
        instances = Instances(self.image_size)
        instances.pred_boxes = Boxes(self.boxes.clone())
        instances.scores = self.scores.clone()
        instances.pred_classes = torch.arange(len(self.scores), device=self.scores.device) % 3
        instances.pred_masks = self.masks.clone()
        return instances

    def inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {"image": torch.zeros(3, *self.image_size, dtype=torch.uint8)}
        if self.size:
            inputs["height"], inputs["width"] = self.size
        return inputs


class Batch(NamedTuple):
    images: list[Image]
    logits: torch.Tensor  # (N, NUM_CLASSES, height / STRIDE, width / STRIDE), padded


class NoBackbone(Backbone):
    size_divisibility = 32

    def forward(self, pixels):
        return {"p2": pixels[..., ::STRIDE, ::STRIDE]}


class NoProposals(nn.Module):
    def forward(self, images, features, targets):
        return [None] * len(images), {}


class DrawnInstances(nn.Module):
    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, images, features, proposals, targets):
        return [image.instances() for image in self.images], {}


class DrawnLogits(SemanticFPNHead):
    def __init__(self, logits):
        shapes = {"p2": ShapeSpec(channels=3, stride=STRIDE)}
        super().__init__(shapes, num_classes=1, conv_dims=1, common_stride=STRIDE)
        self.logits = logits

    def layers(self, features):
        assert self.logits.shape[2:] == features["p2"].shape[2:]
        return self.logits


def network(batch: Batch) -> dict[str, Any]:
    return {
        "backbone": NoBackbone(),
        "proposal_generator": NoProposals(),
        "roi_heads": DrawnInstances(batch.images),
        "sem_seg_head": DrawnLogits(batch.logits),
        "pixel_mean": [0.0, 0.0, 0.0],
        "pixel_std": [1.0, 1.0, 1.0],
    }


def run(model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    model = model.to(batch.logits.device).eval()
    with torch.no_grad():
        return model([image.inputs() for image in batch.images])


def ours(batch: Batch, thresholds: dict[str, float], outputs=OUTPUTS) -> list[dict[str, Any]]:
    return run(PanopticFPNExt(**network(batch), outputs=outputs, **thresholds), batch)


def plain(batch: Batch, thresholds: dict[str, float]) -> list[dict[str, Any]]:
    return run(PanopticFPN(**network(batch), **thresholds), batch)


def padded(image_sizes: list[tuple[int, int]]) -> list[int]:
    """The size of the logits of a batch."""
    divisor = NoBackbone.size_divisibility
    return [math.ceil(max(n) / divisor) * divisor // STRIDE for n in zip(*image_sizes, strict=True)]


def drawn_boxes(rng: torch.Generator, count: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Of ordinary sizes, over the border, outside, of one pixel, of no area, of all the image."""
    height, width = image_size
    edge = torch.tensor([width, height])
    start = torch.rand(count, 2, generator=rng) * edge
    end = start + torch.rand(count, 2, generator=rng) ** 2 * edge
    boxes = torch.cat([start, end], dim=1)
    kinds = torch.randint(0, 10, (count,), generator=rng)
    pixel = start.floor()
    special = {
        4: torch.cat([start - edge / 2, end], dim=1),
        5: torch.cat([start + edge, end + edge], dim=1),
        6: torch.cat([pixel, pixel + 1], dim=1),
        7: torch.cat([start, start + torch.tensor([0.0, 1.0])], dim=1),
        8: torch.cat([start, start + 1e-3], dim=1),
        9: torch.tensor([0.0, 0.0, width, height]).expand(count, 4),
    }
    for kind, replacement in special.items():
        boxes = torch.where((kinds == kind)[:, None], replacement, boxes)
    return boxes


def drawn_batch(
    seed: int,
    counts: list[int],
    sizes: list[tuple[tuple[int, int], tuple[int, int] | None]],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Batch:
    """A batch of images with the numbers of detections and the sizes (image, outputs) given."""
    rng = torch.Generator().manual_seed(seed)
    images = []
    for count, (image_size, size) in zip(counts, sizes, strict=True):
        coarse = torch.rand(count, 1, 7, 7, generator=rng)
        masks = nn.functional.interpolate(coarse, size=28, mode="bilinear") if count else coarse
        # In no order, with ties.
        scores = torch.randint(0, 100, (count,), generator=rng) / 100
        boxes = drawn_boxes(rng, count, image_size)
        images.append(Image(image_size, size, *(x.to(device) for x in (boxes, masks, scores))))
    logits = torch.randn(len(images), NUM_CLASSES, *padded([s[0] for s in sizes]), generator=rng)
    return Batch(images, (3 * logits).to(device, dtype))


def mask_bounds(image: Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Detectron2's masks with pixels in them only where certain, and where possible."""
    height, width = image.size or image.image_size
    boxes = image.instances()
    boxes.remove("pred_masks")
    boxes.index = torch.arange(len(boxes), device=image.boxes.device)
    boxes = detector_postprocess(boxes, height, width)
    arguments = image.masks[boxes.index][:, 0], boxes.pred_boxes, (height, width)
    certain, possible = (
        paste_masks_in_image(*arguments, threshold=0.5 + sign * MASK_ROUNDING).bool()
        for sign in (1, -1)
    )
    return certain, possible


def assert_equals_plain(
    batch: Batch, found: list[dict], expected: list[dict], thresholds: dict, rounding=ROUNDING
) -> None:
    """Classes and masks are the plain path's where rounding cannot turn them, and from them
    follows exactly its panoptic map."""
    for image, mine, theirs in zip(batch.images, found, expected, strict=True):
        size = image.size or image.image_size
        logits, plain_logits = mine["sem_seg"], theirs["sem_seg"]
        assert logits.shape == (NUM_CLASSES, *size)
        assert logits.dtype == plain_logits.dtype
        assert_close(logits, plain_logits, atol=rounding, rtol=0)
        labels, plain_labels = logits.argmax(dim=0), plain_logits.argmax(dim=0)
        top = plain_logits.float().topk(2, dim=0).values
        certain = top[0] - top[1] > 2 * rounding
        assert torch.equal(labels[certain], plain_labels[certain])

        instances, plain_instances = mine["instances"], theirs["instances"]
        assert instances.image_size == size
        for field in ("scores", "pred_classes"):
            assert torch.equal(instances.get(field), plain_instances.get(field))
        boxes = instances.pred_boxes.tensor
        assert torch.equal(boxes, plain_instances.pred_boxes.tensor)
        assert boxes.isfinite().all()
        masks = instances.pred_masks
        assert masks.dtype == torch.bool
        assert masks.shape == plain_instances.pred_masks.shape == (len(instances), *size)
        at_least, at_most = mask_bounds(image)
        assert not (at_least & ~masks).any()
        assert not (masks & ~at_most).any()

        panoptic_seg, segments_info = combine_semantic_and_instance_outputs(
            instances,
            labels,
            thresholds["combine_overlap_thresh"],
            thresholds["combine_stuff_area_thresh"],
            thresholds["combine_instances_score_thresh"],
        )
        assert mine["panoptic_seg"][1] == segments_info
        assert torch.equal(mine["panoptic_seg"][0], panoptic_seg)


def assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Those outputs of an image that were asked for are the same bit by bit."""
    for name, value in found.items():
        if name == "sem_seg":
            assert torch.equal(value, expected[name])
        elif name == "panoptic_seg":
            assert value[1] == expected[name][1]
            assert torch.equal(value[0], expected[name][0])
        else:
            assert set(value.get_fields()) == set(expected[name].get_fields())
            assert torch.equal(value.pred_boxes.tensor, expected[name].pred_boxes.tensor)
            for field in ("scores", "pred_classes", "pred_masks"):
                assert torch.equal(value.get(field), expected[name].get(field))


lengths = st.one_of(st.just(1), st.integers(1, 70))
image_sizes = st.tuples(lengths, lengths)
image_and_output_sizes = st.tuples(image_sizes, st.none() | image_sizes)
thresholds = st.fixed_dictionaries(
    {
        "combine_overlap_thresh": st.sampled_from([0.0, 0.3, 0.5, 0.8]),
        "combine_stuff_area_thresh": st.sampled_from([1, 30, 10_000]),
        "combine_instances_score_thresh": st.sampled_from([0.0, 0.3, 0.7, 1.1]),
    }
)
seeds = st.integers(0, 2**31)
THRESHOLDS = {
    "combine_overlap_thresh": 0.5,
    "combine_stuff_area_thresh": 16,
    "combine_instances_score_thresh": 0.3,
}
LINES = [((1, 60), (1, 90)), ((60, 1), (33, 1)), ((1, 1), (1, 1)), ((40, 50), (1, 64))]


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    images=st.lists(st.tuples(st.integers(0, 8), image_and_output_sizes), min_size=1, max_size=3),
    thresholds=thresholds,
)
@example(seed=0, images=[(0, ((40, 50), None))], thresholds=THRESHOLDS)
@example(seed=1, images=[(8, sizes) for sizes in LINES], thresholds=THRESHOLDS)
@example(
    seed=2,
    images=[(8, ((64, 32), None))],
    thresholds={**THRESHOLDS, "combine_instances_score_thresh": 1.1},
)
def test_a_batch_equals_detectron2s(seed, images, thresholds):
    counts, sizes = zip(*images, strict=True)
    batch = drawn_batch(seed, counts, sizes)
    found = ours(batch, thresholds)
    assert_equals_plain(batch, found, plain(batch, thresholds), thresholds)


small_lengths = st.integers(1, NoBackbone.size_divisibility)
small_image_sizes = st.tuples(small_lengths, small_lengths)


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    images=st.lists(
        # Alone they are padded as in the batch, or the network would see something else.
        st.tuples(st.integers(0, 5), st.tuples(small_image_sizes, st.none() | image_sizes)),
        min_size=2,
        max_size=4,
    ),
)
def test_a_batch_equals_its_images_one_by_one(seed, images):
    counts, sizes = zip(*images, strict=True)
    batch = drawn_batch(seed, counts, sizes)
    together = ours(batch, THRESHOLDS)
    for image, logits, expected in zip(batch.images, batch.logits, together, strict=True):
        (alone,) = ours(Batch([image], logits[None]), THRESHOLDS)
        assert_identical(alone, expected)


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    count=st.integers(0, 8),
    sizes=image_and_output_sizes,
    outputs=st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=2, unique=True),
    dtype=dtypes,
)
def test_each_output_is_the_same_without_the_others(seed, count, sizes, outputs, dtype):
    """With ties among the logits too."""
    batch = drawn_batch(seed, [count], [sizes])
    batch = batch._replace(logits=batch.logits.round().to(dtype))
    (expected,) = ours(batch, THRESHOLDS)
    (found,) = ours(batch, THRESHOLDS, outputs)
    assert set(found) == set(outputs)
    assert_identical(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    count=st.integers(0, 8),
    sizes=image_and_output_sizes,
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    autocast=st.booleans(),
)
def test_half_precision(seed, count, sizes, dtype, autocast):
    """As accurate as the numbers: those of the plain path are rounded after each of its steps."""
    batch = drawn_batch(seed, [count], [sizes], dtype)
    (image,) = batch.images
    half = image._replace(masks=image.masks.to(dtype))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = ours(Batch([half], batch.logits), THRESHOLDS)
    assert found[0]["sem_seg"].dtype == dtype
    found[0]["sem_seg"] = found[0]["sem_seg"].float()
    exact = Batch([image._replace(masks=half.masks.float())], batch.logits.float())
    rounding = 4 * torch.finfo(dtype).eps * batch.logits.float().abs().max().item()
    assert_equals_plain(exact, found, plain(exact, THRESHOLDS), THRESHOLDS, rounding)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, count=st.integers(0, 8), sizes=image_and_output_sizes)
def test_autocast_does_not_make_it_less_accurate(seed, count, sizes):
    batch = drawn_batch(seed, [count], [sizes])
    (expected,) = ours(batch, THRESHOLDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = ours(batch, THRESHOLDS)
    assert_identical(found, expected)


def test_hard_sizes(device):
    sizes = [*LINES[::2], ((40, 50), None), ((60, 90), (33, 70))]
    batch = drawn_batch(3, [8] * len(sizes), sizes, device=device)
    expected = ours(batch, THRESHOLDS)
    assert_equals_plain(batch, expected, plain(batch, THRESHOLDS), THRESHOLDS)
    # On GPUs other kernels make the map where it is all that is asked for; ties may fall elsewhere.
    for found, each in zip(ours(batch, THRESHOLDS, ["panoptic_seg"]), expected, strict=True):
        (ids, segments), (other_ids, other_segments) = found["panoptic_seg"], each["panoptic_seg"]
        assert (ids != other_ids).float().mean() < 0.01
        categories = [[(s["id"], s["category_id"]) for s in x] for x in (segments, other_segments)]
        assert categories[0] == categories[1]


def test_1000_detections(device):
    batch = drawn_batch(0, [1000], [((96, 128), (120, 150))], device=device)
    found = ours(batch, THRESHOLDS)
    assert len(found[0]["instances"]) > 800
    assert_equals_plain(batch, found, plain(batch, THRESHOLDS), THRESHOLDS)


EIGHT_MEGAPIXELS = """
from pathlib import Path
from tests.modeling.test_robustness import *

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def run(size, num_classes):
    batch = drawn_batch(0, [100], [(size, None)])
    logits = torch.randn(num_classes, *padded([size]))
    postprocess = PanopticPostprocessor(outputs=["panoptic_seg"], **THRESHOLDS)
    (image,) = batch.images
    before = peak()
    result = postprocess(logits, image.instances(), size, image.inputs(), stride=STRIDE)
    assert len(result["panoptic_seg"][1]) > 20
    return peak() - before

run((64, 64), 54)  # loads what the first call loads
print(run((2448, 3264), 54))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_8_megapixels_need_memory_for_a_few_maps_only():
    """Of the network's input and of the outputs; 54 classes, 100 detections, some over the whole
    image. The logits at full resolution would be 1.7 GB, the masks 0.8 GB."""
    process = subprocess.run(
        [sys.executable, "-c", EIGHT_MEGAPIXELS],
        cwd=REPOSITORY,
        # With glibc's own, growing threshold freed memory stays resident, now more, now less.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    label_map = 2448 * 3264 * 8  # int64
    assert int(process.stdout) < 4 * label_map
