"""Datasets whose JSON has something else anywhere: they are read, or refused in one line."""

import copy
import json
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext import PanopticFPNMapper, UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.config import resolve_config

from .tiny_dataset import TinyDataset

pytestmark = pytest.mark.faults

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.sampled_from([2**31, 2**64, -(2**63), 256**3, float("nan"), float("inf"), 1e308, 0.5])
    | st.text(max_size=3)
    | st.sampled_from([[], {}, [[]], [0, 0, 0, 0], [[0, 0, 1]], {"size": [2, 2], "counts": "@@"}])
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something is in a JSON."""
    found = [path]
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyDataset:
    return TinyDataset(tmp_path_factory.mktemp("tiny"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_other_values_in_a_json(data, draws):
    pristine = {"panoptic": data.panoptic, "instances": data.instances}
    which = draws.draw(st.sampled_from(sorted(pristine)))
    broken = copy.deepcopy(pristine[which])
    *path, last = draws.draw(st.sampled_from([p for p in places(broken) if p]))
    holder = broken
    for key in path:
        holder = holder[key]
    if isinstance(holder, dict) and draws.draw(st.booleans()):
        del holder[last]
    elif isinstance(holder, list) and draws.draw(st.booleans()):
        holder.append(copy.deepcopy(holder[last]))
    else:
        holder[last] = draws.draw(VALUES)
    file = data.panoptic_json if which == "panoptic" else data.instances_json
    data.write()
    file.write_text(json.dumps(broken))
    try:
        read(data)
    except UserError as error:
        assert "\n" not in str(error)
        assert str(error)


def read(data: TinyDataset) -> None:
    """What a training does with a dataset."""
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPNExt"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticFPNHead"
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    with data.registered(instances=True) as name:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        mapper = PanopticFPNMapper(resolve_config(cfg), is_train=True)
        for record in DatasetCatalog.get(name):
            mapper(record)
