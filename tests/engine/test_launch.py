"""Starting processes."""

import pytest

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import launch


def test_several_machines_need_an_address():
    with pytest.raises(UserError, match="--dist-url is needed with several machines"):
        launch(print, 1, num_machines=2)


def test_one_process_runs_here():
    called = []
    launch(called.append, 1, args=("argument",))
    assert called == ["argument"]
