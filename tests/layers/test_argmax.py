"""The class of each pixel, against PyTorch's argmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext.layers import argmax
from panoptic_fpn_ext.layers.argmax import argmax_classes


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 30)),
    scale=st.sampled_from([1e-25, 1e-3, 1.0, 1e30]),
    levels=st.sampled_from([2, 10, 2**20]),  # few: many ties
    special=st.lists(st.sampled_from([math.inf, -math.inf, math.nan]), max_size=3),
)
def test_equals_pytorch(seed, shape, scale, levels, special):
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randint(0, levels, shape, generator=rng) / levels - 0.5) * scale
    for value in special:
        if logits.numel():
            logits.view(-1)[torch.randint(0, logits.numel(), (), generator=rng)] = value
    assert torch.equal(argmax_classes(logits), logits.argmax(dim=0))


def test_strips(monkeypatch):
    monkeypatch.setattr(argmax, "STRIP", 100)
    logits = torch.randn(7, 11, 13)
    assert torch.equal(argmax_classes(logits), logits.argmax(dim=0))
    transposed = logits.transpose(1, 2)
    assert torch.equal(argmax_classes(transposed), transposed.argmax(dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, device):
    logits = torch.randn(7, 11, 13).to(device, dtype).round()  # with ties
    assert torch.equal(argmax_classes(logits), logits.argmax(dim=0))
