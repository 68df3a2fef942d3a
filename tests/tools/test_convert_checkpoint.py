"""tools/convert_checkpoint.py: the weights, all of them, and nothing else."""

import importlib.util
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.engine import trained_model
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer
from panoptic_fpn_ext.engine.checkpoint_files import read_checkpoint

from ..conftest import CPU, REPOSITORY, assert_same_outputs


@pytest.fixture
def device() -> torch.device:
    """Files are the same everywhere."""
    return CPU


spec = importlib.util.spec_from_file_location(
    "convert_checkpoint", REPOSITORY / "tools" / "convert_checkpoint.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def convert(*arguments: str | Path) -> None:
    tool.main([*map(str, arguments)])


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_trained_network_is_the_same_there_and_back(trained, tmp_path, capsys):
    source = trained / "model_final.pth"
    middle, back = tmp_path / "weights.safetensors", tmp_path / "back.pth"
    convert(source, middle)
    words = [word.strip("(),") for word in capsys.readouterr().out.splitlines()[-1].split()]
    assert words[:2] == ["left", "out:"]
    assert {"iteration", "trainer", "optimizer", "hooks", "order"} <= {*words}
    convert(middle, back)
    assert "left out" not in capsys.readouterr().out
    expected = torch.load(source, weights_only=True)["model"]
    assert_same_weights(safetensors.torch.load_file(middle), expected)
    assert_same_weights(torch.load(back, weights_only=True)["model"], expected)
    assert torch.load(back, weights_only=True).keys() == {"model"}
    assert middle.stat().st_size < source.stat().st_size / 2

    cfg = network(trained)
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    outputs = []
    for path in (source, middle, back):
        cfg.MODEL.WEIGHTS = str(path)
        with torch.no_grad():
            outputs.append(trained_model(cfg)([image])[0])
    for other in outputs[1:]:
        assert torch.equal(other["sem_seg"], outputs[0]["sem_seg"])
        assert torch.equal(other["panoptic_seg"][0], outputs[0]["panoptic_seg"][0])
        assert_same_outputs(other, outputs[0])


def network(folder: Path) -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_of_the_model_zoo_keeps_whose_names_it_has(ext_cfg, tmp_path, ending):
    """Its backbone has the names of another, which are matched when it is loaded."""
    prefix = "backbone.bottom_up."
    expected = {
        name: value
        for name, value in build_model(ext_cfg).state_dict().items()
        if name.startswith(prefix)
    }
    weights = {name.removeprefix(prefix): value.numpy() for name, value in expected.items()}
    content = {"model": weights, "__author__": "a converter", "matching_heuristics": True}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    output = tmp_path / f"zoo.{ending}"
    convert(tmp_path / "zoo.pkl", output)
    found = read_checkpoint(str(output))
    assert found["matching_heuristics"] is True and found["__author__"] == "a converter"
    model = build_model(ext_cfg)
    PanopticFPNCheckpointer(model).load(str(output))
    assert_same_weights(
        {name: value for name, value in model.state_dict().items() if name in expected}, expected
    )


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_of_every_kind(tmp_path, ending, capsys):
    shared = torch.arange(12.0).reshape(3, 4)
    weights = {
        "a": shared,
        "the same": shared,
        "a part": shared[1:, 2:],
        "turned": shared.T,
        "half": torch.ones(2, dtype=torch.float16),
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "truth": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    torch.save(weights, tmp_path / "bare.pth")
    output = tmp_path / f"out.{ending}"
    convert(tmp_path / "bare.pth", output)
    expected = {name: value.detach() for name, value in weights.items()}
    assert_same_weights(read_checkpoint(str(output))["model"], expected)
    said = capsys.readouterr().out
    assert "10 tensors" in said and "left out" not in said


@pytest.mark.faults
def test_what_cannot_be_done_is_one_line(tmp_path):
    good, text = tmp_path / "good.pth", tmp_path / "text.pth"
    torch.save({"model": {"a": torch.ones(10**5)}}, good)
    text.write_text("no checkpoint")
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch trace'\ntR.")
    torch.save({"model": {"a": torch.ones(2, dtype=torch.complex128)}}, tmp_path / "complex.pth")
    there = tmp_path / "there.pth"
    there.write_bytes(b"of another")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments, limit, message in (
        ((tmp_path / "nowhere.pth", out), None, "nowhere.pth: no such file"),
        ((good, tmp_path / "out.pkl"), None, "must end in .safetensors or .pth"),
        ((good, good), None, "is INPUT: choose another"),
        ((good, good, "--overwrite"), None, "is INPUT: choose another"),
        ((good, there), None, "--overwrite replaces it"),
        ((good, tmp_path / "nowhere" / "out.pth"), None, "there is no folder"),
        ((text, out), None, "text.pth: not a checkpoint, or damaged"),
        ((tmp_path / "evil.pkl", out), None, "asks for os.system"),
        ((tmp_path / "complex.pth", out), None, "cannot hold these weights"),
        ((good, out), 1000, "cannot be written (File too large)"),
        ((good, tmp_path / "out.pth"), 1000, "cannot be written (File too large)"),
        ((good, there, "--overwrite"), 1000, "cannot be written (File too large)"),
    ):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
            with pytest.raises(UserError) as error:
                convert(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert message in str(error.value) and "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    convert(good, there, "--overwrite")
    found = torch.load(there, weights_only=True)["model"]["a"]
    assert np.array_equal(found.numpy(), np.ones(10**5, np.float32))


def test_the_command_line_says_it_with_status_2(tmp_path):
    run = subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", "nowhere.pth", str(tmp_path / "out.pth")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last == "convert_checkpoint.py: error: INPUT nowhere.pth: no such file"
