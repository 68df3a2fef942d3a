"""Any value for any key: a config that can be run, or one line."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import setup

from ..conftest import CONFIG
from .test_setup import arguments

OURS = [
    *("MODEL.PANOPTIC_FPN.OUTPUTS", "MODEL.PANOPTIC_FPN.TRAINING", "MODEL.PANOPTIC_FPN.PRECISION"),
    *("MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.SEM_SEG_HEAD.NORM"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.NAME", "MODEL.BACKBONE.NAME"),
    *("MODEL.META_ARCHITECTURE", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.FPN.OUT_CHANNELS"),
    *("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.PANOPTIC", "SOLVER.IMS_PER_BATCH"),
    *("SOLVER.OPTIMIZER", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_KEEP"),
    *("TEST.EVALUATORS", "TEST.BEST_METRIC", "TEST.PATIENCE", "INPUT.CROP.SIZE", "SEED"),
]
VALUES = st.sampled_from(
    [
        *("", "x", "-1", "0", "1", "1e400", "nan", "None", "True", "[]", "()", "{}", "[[]]"),
        *("('shapes_train',)", "['panoptic_seg']", "[{'name': 1}]", "'a\nb'", "1" * 400, "\x00"),
        *("!!python/object/apply:os.system ['true']", "cuda:99", "meta", "BN", "GN", "../x.pth"),
    ]
) | st.text(max_size=6)


@pytest.mark.faults
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example([("MODEL.WEIGHTS", "'a\nb'")])
@example([("MODEL.DEVICE", "None")])
@example([("MODEL.FPN.OUT_CHANNELS", "None"), ("MODEL.FPN.OUT_CHANNELS", "")])
@example([("MODEL.META_ARCHITECTURE", "None")])
@example([("MODEL.SEM_SEG_HEAD.CONVS_DIM", "None")])
@example([("MODEL.PANOPTIC_FPN.OUTPUTS", "None")])
@given(st.lists(st.tuples(st.sampled_from(OURS), VALUES), min_size=1, max_size=2))
def test_any_value_for_any_key(shapes, tmp_path, pairs):
    options = [word for pair in pairs for word in pair]
    try:
        cfg = setup(arguments(CONFIG, *options, "OUTPUT_DIR", str(tmp_path)))
    except UserError as error:
        assert str(error)
        assert "\n" not in str(error)
    else:
        assert cfg.is_frozen()
