"""Choosing by measuring; nothing here asks how fast this machine is."""

import logging
import time
from collections import Counter

import pytest
import torch

from panoptic_fpn_ext.layers import fastest as module
from panoptic_fpn_ext.layers.fastest import fastest, magnitude


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})


class Ways:
    """Ways that take so many milliseconds by a clock of their own, and are counted."""

    def __init__(self, monkeypatch, **milliseconds: float) -> None:
        self.runs = Counter()
        self.now = 0.0
        self.milliseconds = milliseconds
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self) -> dict:
        return {name: lambda name=name: self.run(name) for name in self.milliseconds}

    def run(self, name: str) -> None:
        self.runs[name] += 1
        self.now += self.milliseconds[name] / 1000


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({"plain": 10, "other": 5}, "other"),
        ({"plain": 10, "other": 20}, "plain"),
        ({"plain": 10, "other": 9.8}, "plain"),  # as good as equal: the plain one
        ({"plain": 10, "other": 8, "third": 2}, "third"),
    ],
)
def test_the_fastest_is_chosen_and_said_once(milliseconds, expected, monkeypatch, caplog):
    ways = Ways(monkeypatch, **milliseconds)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        found = [fastest("it", "key", ways, about="what is done") for _ in range(3)]
    assert found == [expected] * 3
    assert [record.message for record in caplog.records] == [caplog.messages[0]]
    assert f": {expected} (plain 10.00 ms" in caplog.messages[0]
    assert "what is done" in caplog.messages[0]


def test_a_choice_is_kept_for_what_it_was_measured_on(monkeypatch):
    ways = Ways(monkeypatch, plain=10, other=5)
    fastest("it", "key", ways, about=None)
    measured = ways.runs.total()
    fastest("it", "key", ways, about=None)
    assert ways.runs.total() == measured
    for what, key in (("it", "another"), ("something else", "key")):
        fastest(what, key, ways, about=None)
    assert ways.runs.total() == 3 * measured
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        fastest("it", "key", ways, about=None)
    finally:
        torch.set_num_threads(threads)
    assert ways.runs.total() == 4 * measured


def test_what_is_to_be_deterministic_is_not_measured(monkeypatch):
    ways = Ways(monkeypatch, plain=10, other=5)
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest("it", "key", ways, about=None) == "plain"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not ways.runs
    assert fastest("it", "key", ways, about=None) == "other"


def test_what_is_hopeless_is_timed_once(monkeypatch):
    ways = Ways(monkeypatch, plain=10, other=100)
    fastest("it", "key", ways, about=None)
    assert ways.runs["other"] == 2  # once to warm up
    assert ways.runs["plain"] == 1 + module.RUNS


def test_magnitudes_are_alike_for_like_numbers():
    assert magnitude(1000, 2**14) == magnitude(900, 2**14) != magnitude(100, 2**14)
    assert magnitude(10**6, 2**14) == magnitude(2**14, 2**14)
