"""Merging by kernels against the loop, bit for bit; on CPUs by Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from panoptic_fpn_ext.layers import mask_bits  # tests/conftest.py has them interpreted on CPUs
from panoptic_fpn_ext.layers.pasting import PastedMasks
from panoptic_fpn_ext.modeling import merging, merging_kernels, postprocessing
from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor

from ..conftest import needs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 200 if DEVICE == "cuda" else 5
FIXTURE = HealthCheck.function_scoped_fixture
pytestmark = [needs_triton(), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch) -> None:
    """Triton's interpreter is slow at each."""
    if DEVICE == "cpu":
        for module in (mask_bits, merging_kernels):
            monkeypatch.setattr(module, "WORDS", 256)


def make_instances(seed: int, number: int, size: tuple[int, int], resolution: int) -> Instances:
    """Of all sizes, over the border and outside, some without area, some scores equal."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    limits = torch.tensor([width, height])
    start = (1.4 * torch.rand(number, 2, generator=rng) - 0.2) * limits
    extent = torch.rand(number, 2, generator=rng) ** 2 * limits
    extent[torch.rand(number, generator=rng) < 0.1] = 0
    boxes = torch.cat([start, start + extent], dim=1).to(DEVICE)
    scores = torch.rand(number, generator=rng)
    scores[::5] = 0.7
    return Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=scores.to(DEVICE),
        pred_classes=torch.randint(0, 3, (number,), generator=rng).to(DEVICE),
        pred_masks=torch.rand(number, 1, resolution, resolution, generator=rng).to(DEVICE),
    )


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[FIXTURE])
@given(
    seed=st.integers(0, 2**31),
    number=st.sampled_from([0, 1, 3, 33]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 100)),
    overlap=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    area_limit=st.sampled_from([0, 1, 40, 10_000]),
    score=st.sampled_from([0.0, 0.3, 0.7]),
    nms_threshold=st.sampled_from([0.4, 1.0]),
    things=st.sampled_from([(), (0,), (1, 3)]),
)
@example(0, 40, (40, 64), 0.5, 1, 0.0, 1.0, (0,))
@example(5, 100, (30, 50), 1.0, 1, 0.0, 1.0, (0,))
def test_equals_the_loop(seed, number, size, overlap, area_limit, score, nms_threshold, things):
    instances = make_instances(seed, number, size, 7)
    labels = torch.randint(0, 5, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    rule = merging.Rule(
        thing_sem_seg_ids=frozenset(things),
        overlap_threshold=overlap,
        stuff_area_thresh=area_limit,
        instances_score_thresh=score,
        nms_thresh=nms_threshold,
    )
    boxes = instances.pred_boxes.tensor
    pasted = PastedMasks(instances.pred_masks[:, 0], boxes, size)
    masks = pasted.bits().unpacked()
    instances.pred_masks = masks
    expected = merging._merged_in_turn(instances, labels, rule)
    found = merging._merged_at_once(instances, labels, rule, num_classes=5)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)

    instances.pred_masks = pasted
    found = merging._merged_at_once(instances, labels, rule, num_classes=5)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[FIXTURE])
@given(
    seed=st.integers(0, 2**31),
    number=st.integers(0, 9),
    size=st.tuples(st.integers(1, 50), st.integers(1, 100)),
    resolution=st.sampled_from([1, 7, 28]),
    threshold=st.sampled_from([0.1, 0.5]),
)
def test_masks_are_detectron2s(seed, number, size, resolution, threshold):
    instances = make_instances(seed, number, size, resolution)
    instances.pred_boxes.clip(size)  # Detectron2's wants that
    masks, boxes = instances.pred_masks[:, 0], instances.pred_boxes.tensor
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    found = PastedMasks(masks, boxes, size, threshold).bits()
    unpacked = found.unpacked()
    # Detectron2 refuses boxes that are wholly outside.
    limits = boxes.new_tensor([size[1], size[0]])
    inside = has_area & ((boxes[:, :2] < limits) & (boxes[:, 2:] > 0)).all(dim=1)
    # On CPUs, where it too stays within a pixel of the box: what low thresholds reach beyond.
    inputs = masks[inside].cpu(), boxes[inside].cpu(), size
    expected = paste_masks_in_image(*inputs, threshold).bool().to(DEVICE)
    values = paste_masks_in_image(*inputs, threshold=-1).to(DEVICE)
    certain = (values.int() - round(255 * threshold)).abs() > 1
    assert torch.equal(unpacked[inside][certain], expected[certain])
    assert not unpacked[~has_area].any()
    assert torch.equal(found.areas.long(), unpacked.sum(dim=(1, 2)))
    again = mask_bits.packed_bits(unpacked)
    assert torch.equal(again.unpacked(), unpacked)
    assert torch.equal(again.areas, found.areas)


@pytest.mark.parametrize("outputs", [["panoptic_seg"], ["panoptic_seg", "instances"]])
def test_postprocessing_by_kernels_is_that_of_the_loop(outputs, monkeypatch):
    """Instances whose box has no area in the image are not counted."""
    postprocess = PanopticPostprocessor(outputs=outputs, combine_stuff_area_thresh=9)
    logits = torch.randn(5, 8, 12, device=DEVICE)

    def run():
        instances = make_instances(3, 20, (32, 48), 14)
        return postprocess(logits, instances, (32, 47), {"height": 61, "width": 70}, stride=4)

    found = []
    for at_once in (True, False):
        for module in (merging, postprocessing):
            monkeypatch.setattr(module, "merges_at_once", lambda x, at_once=at_once: at_once)
        found.append(run()["panoptic_seg"])
    (ids, segments), (expected_ids, expected) = found
    assert (ids != expected_ids).float().mean() < 0.01  # rounding turns single pixels
    things = [[s for s in info if s["isthing"]] for info in (segments, expected)]
    assert things[0] == things[1] != []


class Launches:
    """In a kernel's place: counts."""

    def __init__(self) -> None:
        self.number = 0

    def __getitem__(self, grid: tuple):
        return self

    def __call__(self, *args, **options) -> None:
        self.number += 1


class Operators(TorchDispatchMode):
    """Counts operators, and of those what waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        name = func.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "nonzero", "bincount", "masked_select")
        if name in ("index", "index_put_"):
            masks = (torch.bool, torch.uint8)
            self.waits += any(x is not None and x.dtype in masks for x in args[1])
        return func(*args, **(kwargs or {}))


def test_as_many_launches_for_many_instances_as_for_one(monkeypatch):
    launches = Launches()
    for module, name in (
        (mask_bits, "_paste_kernel"),
        (merging_kernels, "_keep_kernel"),
        (merging_kernels, "_ids_kernel"),
    ):
        monkeypatch.setattr(module, name, launches)
    for module in (merging, postprocessing):
        monkeypatch.setattr(module, "merges_at_once", lambda x: True)
    labels = torch.zeros(61, 70, dtype=torch.int64, device=DEVICE)
    monkeypatch.setattr(postprocessing, "upsampled_labels", lambda *x, **sizes: labels)
    told = []
    monkeypatch.setattr(merging, "_add_stuff", lambda *x: None)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: told.append(x.shape) or tolist(x))
    postprocess = PanopticPostprocessor(outputs=["panoptic_seg"])
    counted = []
    for number in (1, 1, 100):  # something is made at first and kept
        instances = make_instances(0, number, (32, 48), 14)
        launches.number = 0
        told.clear()
        with Operators() as operators:
            postprocess(
                torch.zeros(5, 8, 12, device=DEVICE),
                instances,
                (32, 48),
                {"height": 61, "width": 70},
                stride=4,
            )
        assert operators.waits == 0
        assert len(told) == 1  # the one wait
        counted.append((launches.number, operators.number))
    assert counted[1] == counted[2]
    assert counted[2][0] == 3
    assert counted[2][1] < 100


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_masks_are_packed_chunk_by_chunk(chunk, monkeypatch):
    monkeypatch.setattr(merging, "PACKED_AT_ONCE", chunk)
    masks = torch.rand(5, 6, 37, device=DEVICE) < 0.4
    order = torch.tensor([3, 0, 4], device=DEVICE)
    packed = merging._packed(masks, order)
    assert torch.equal(packed.unpacked(), masks[order])
    assert packed.areas.tolist() == masks[order].sum(dim=(1, 2)).tolist()
    assert merging._packed(masks[:0], order[:0]).unpacked().shape == (0, 6, 37)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_gpu_merges_at_once_with_one_wait_in_bounded_memory(recwarn):
    """8 megapixels, 100 instances: the bits, 100 MB, and some maps of the image; boolean masks
    alone would be 800 MB."""
    size = 2448, 3264
    labels = torch.zeros(size, dtype=torch.int64, device=DEVICE)
    assert merging.merges_at_once(labels)
    instances = make_instances(0, 100, (800, 1067), 28)
    rule = {
        "thing_sem_seg_ids": {0},
        "overlap_threshold": 0.5,
        "stuff_area_thresh": 4096,
        "instances_score_thresh": 0.0,
        "num_classes": 5,
    }

    def run():
        rescaled = postprocessing._rescaled(instances, size, drop_empty=False)
        return merging.merge_panoptic(rescaled, labels, **rule)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mode = torch.cuda.get_sync_debug_mode()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    # The mode itself warns that it does not detect all "synchronizing operations".
    waits = [w for w in recwarn if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1
    assert torch.cuda.max_memory_allocated() - before < 400 * 2**20


COMPILE = """
from inspect import signature
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from panoptic_fpn_ext.layers import kernels, mask_bits
from panoptic_fpn_ext.modeling import merging_kernels

TYPES = {
    "*fp32": "probabilities boxes logits factor losses normalizers gradient",
    "*i32": "windows bits areas taken kept ids class_areas counts",
    "*i64": "labels targets",
    "*i8": "valid masks",
    "fp32": "scale scale_y scale_x",
}
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
CONSTANTS = {"BLOCK": 32, "CLASSES": 16, "STEP": 1024}
for module in (kernels, mask_bits, merging_kernels):
    for name, kernel in vars(module).items():
        if name.endswith("_kernel"):
            threshold = "*fp64" if name == "_keep_kernel" else "fp32"
            types = TYPES | dict.fromkeys(CONSTANTS, "constexpr") | {"threshold": threshold}
            kinds = {n: types.get(n, "i32") for n in kernel.arg_names}
            constants = {i: CONSTANTS[n] for i, n in enumerate(kinds) if n in CONSTANTS}
            if "constexprs" in signature(ASTSource).parameters:
                source = ASTSource(kernel, kinds, {(i,): v for i, v in constants.items()})
            else:  # PyTorch 2.4 has such a Triton
                kinds = {i: kind for i, kind in enumerate(kinds.values()) if i not in constants}
                source = ASTSource(kernel, kinds, constants)
            assert "cubin" in compile(source, target=GPUTarget("cuda", 90, 32)).asm
            print(name)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    """Also where there is none."""
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 7
