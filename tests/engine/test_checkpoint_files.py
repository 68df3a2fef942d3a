"""Checkpoint files of strangers, whole and broken: weights are read, and nothing is run."""

import io
import itertools
import os
import pickle
import pickletools
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import setup
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer
from panoptic_fpn_ext.engine.checkpoint_files import DamagedCheckpoint, read_checkpoint

from ..conftest import CONFIG, CPU, SMALL, train_net
from .test_setup import arguments

WEIGHTS = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
ARRAYS = {name: value.numpy() for name, value in WEIGHTS.items()}


@pytest.fixture
def device() -> torch.device:
    """Files are the same everywhere."""
    return CPU


# Files of strangers


class Calls:
    """Unpickled, it has called a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def hostile(trace: Path) -> dict[str, Any]:
    """By what they ask for, objects that would leave a trace."""
    command, code = f"touch {trace}", f"open({str(trace)!r}, 'w')"
    inner = np.empty(1, dtype=object)
    inner[0] = Calls(os.system, command)
    return {
        f"{os.system.__module__}.system": Calls(os.system, command),
        ".Popen": Calls(subprocess.Popen, ["touch", str(trace)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "runpy._run_code": Calls(__import__("runpy")._run_code, code, {}),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, command))),
        "torch.serialization.load": Calls(torch.load, str(trace)),
        "numpy.ndarray of objects": inner,
    }


NAMES = list(hostile(Path()))
SAVERS = {
    "zip.pth": torch.save,
    "legacy.pth": lambda content, path: torch.save(
        content, path, _use_new_zipfile_serialization=False
    ),
    "pycls.pyth": lambda content, path: torch.save({"model_state": content}, path),
    "no_ending": torch.save,
    **{
        f"protocol_{p}.pkl": lambda content, path, p=p: path.write_bytes(pickle.dumps(content, p))
        for p in (0, 2, 4, 5)
    },
}


@pytest.mark.faults
@pytest.mark.parametrize("file", SAVERS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_hostile_file_is_run(tmp_path, name, file):
    trace = tmp_path / "trace"
    path = tmp_path / file
    weights = ARRAYS if file.endswith("pkl") else WEIGHTS
    content = {"model": weights, "__author__": "a stranger", "more": hostile(trace)[name]}
    SAVERS[file](content, path)
    with pytest.raises(UserError) as error:
        PanopticFPNCheckpointer(nn.Linear(2, 1)).load(str(path))
    assert not trace.exists()
    assert f"{path}: asks for " in str(error.value)
    if "array" not in name:
        assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("pickled", "wanted"),
    [
        (b"cos\nsystem\n(S'touch TRACE'\ntR.", "os.system"),
        (b"(S'touch TRACE'\nios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0edict.__class__\x93.", "builtins.dict.__class__"),
        (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
        (b"\x80\x02cnumpy.core.multiarray\nfrombuffer\n.", "numpy.core.multiarray.frombuffer"),
    ],
)
def test_pickles_by_hand(tmp_path, monkeypatch, pickled, wanted):
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(pickled.replace(b"TRACE", b"trace"))
    with pytest.raises(UserError, match=f"a.pkl: asks for {wanted}, which weights have no need of"):
        read_checkpoint("a.pkl")
    assert not Path("trace").exists()


@pytest.mark.faults
def test_programs_and_old_archives_are_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 1)).save(tmp_path / "program.pth")
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    for name, wanted in (("program", "a TorchScript program"), ("old", "a tar archive")):
        with pytest.raises(UserError, match=f"{name}.pth: asks for {wanted}, which"):
            read_checkpoint(str(tmp_path / f"{name}.pth"))


@pytest.mark.faults
@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "--resume", "MODEL.TWO_NETWORK"])
def test_the_command_line_runs_nothing(shapes, tmp_path, key):
    trace, path = tmp_path / "trace", tmp_path / "model_final.pth"
    torch.save({"model": WEIGHTS, "trainer": Calls(os.system, f"touch {trace}")}, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    options = ["MODEL.WEIGHTS", path]
    if key == "MODEL.TWO_NETWORK":
        options = ["MODEL.META_ARCHITECTURE", "TwoNetworkPanopticFPN"]
        for name in ("INSTANCE_WEIGHTS", "SEMANTIC_WEIGHTS"):
            options += [f"{key}.{name}", path]
    output = tmp_path if key == "--resume" else tmp_path / "output"
    flags = ["--resume"] if key == "--resume" else []
    run = train_net("--config-file", CONFIG, *flags, *SMALL, *options, "OUTPUT_DIR", output)
    assert run.returncode == 2, run.stderr[-3000:]
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("train_net.py: error: ")
    assert f"{path}: asks for {os.system.__module__}.system, which weights" in line
    assert "Traceback" not in run.stdout + run.stderr
    assert not trace.exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:eval"],
)
@pytest.mark.parametrize("base", [False, True])
def test_a_config_runs_nothing(tmp_path, monkeypatch, request, tag, base):
    monkeypatch.chdir(request.config.rootpath)
    trace = tmp_path / "trace"
    (tmp_path / "hostile.yaml").write_text(f"OUTPUT_DIR: !!python/{tag} ['touch {trace}']\n")
    (tmp_path / "based.yaml").write_text("_BASE_: hostile.yaml\n")
    path = tmp_path / ("based.yaml" if base else "hostile.yaml")
    with pytest.raises(UserError, match=rf"{path.name}: .*python/.*hostile\.yaml") as error:
        setup(arguments(str(path)))
    assert "\n" not in str(error.value)
    assert not trace.exists()


# Files of the model zoos


def loaded(checkpointer: type, model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    checkpointer(model).load(str(path))
    return {name: value.clone() for name, value in model.state_dict().items()}


def caffe2_weights(model: nn.Module, dtype: str) -> dict[str, np.ndarray]:
    """A ResNet of 18 layers under Caffe2's names; a classifier with Caffe2's background first."""
    random = np.random.default_rng(0)
    weights = {}
    for name, value in model.state_dict().items():
        stem, _, kind = name.removeprefix("backbone.bottom_up.").rpartition(".")
        if not name.startswith("backbone.bottom_up.") or kind not in ("weight", "bias"):
            continue
        if stem.startswith("stem.conv1"):
            stem = stem.replace("stem.conv1", "conv1")
        else:
            stage, block, stem = stem.split(".", 2)
            branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b"}
            layer, _, norm = stem.partition(".")
            stem = f"{stage}_{block}_{branch[layer]}{'.norm' if norm else ''}"
        letter = "w" if kind == "weight" else "b"
        if stem.endswith(".norm"):
            stem = "res_conv1" if stem == "conv1.norm" else stem.removesuffix(".norm")
            letter = f"bn_{'s' if kind == 'weight' else 'b'}"
        weights[f"{stem}_{letter}"] = random.normal(size=value.shape).astype(dtype)
    weights["conv1_w_momentum"] = np.zeros(3, dtype)
    return weights


def as_python_2(content: dict) -> bytes:
    """Protocol 2, and the name that NumPy's module had."""
    return pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize(
    ("form", "dtype", "protocol"),
    [
        *itertools.product(["blobs", "bare", "heuristics", "zoo"], ["float32", "float16"], [4]),
        *itertools.product(["blobs", "zoo"], ["float32"], [0, 2, 5, "python 2"]),
    ],
)
def test_model_zoos_load_as_in_detectron2(ext_cfg, tmp_path, form, dtype, protocol):
    model = build_model(ext_cfg)
    content: dict[str, Any] = caffe2_weights(model, dtype)
    if form == "blobs":
        content = {"blobs": content, "cfg": "MODEL: größer"}
    elif form == "heuristics":
        weights = {
            name.removeprefix("backbone.bottom_up."): torch.randn(value.shape).numpy().astype(dtype)
            for name, value in model.state_dict().items()
            if name.startswith("backbone.bottom_up.") and value.is_floating_point()
        }
        content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    elif form == "zoo":
        weights = OrderedDict(
            (name, torch.randn(value.shape).numpy().astype(dtype))
            for name, value in model.state_dict().items()
        )
        content = {"model": weights, "__author__": "Detectron2 Model Zoo", "epoch": np.int64(3)}
    path = tmp_path / "zoo.pkl"
    if protocol == "python 2":
        path.write_bytes(as_python_2(content))
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    expected = loaded(DetectionCheckpointer, model, path)
    found = loaded(PanopticFPNCheckpointer, model, path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_strings_of_python_2_are_latin1(tmp_path):
    path = tmp_path / "two.pkl"
    path.write_bytes(b"\x80\x02}(U\x05modelq\x00}U\n__author__U\x03\xe9\xfc\xdfu.")
    assert read_checkpoint(str(path)) == {"model": {}, "__author__": "éüß"}


def test_pycls_and_bare_weights_load_as_in_detectron2(tmp_path):
    model = nn.Sequential(OrderedDict(s1=nn.Linear(2, 1), s2=nn.BatchNorm1d(1)))
    weights = {name: torch.rand(value.shape) for name, value in model.state_dict().items()}
    contents = {
        "pycls.pyth": {"model_state": weights, "epoch": 3},
        "bare.pth": weights,
        "other_ending.bin": {"model": weights},
        "parallel.pth": {"model": {f"module.{name}": value for name, value in weights.items()}},
        "arrays.pth": {"model": {name: value.numpy() for name, value in weights.items()}},
    }
    for name, content in contents.items():
        path = tmp_path / name
        torch.save(content, path)
        found = loaded(PanopticFPNCheckpointer, model, path)
        for key, value in weights.items():
            if "num_batches" not in key:
                assert torch.equal(found[key], value), (name, key)


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    found = loaded(PanopticFPNCheckpointer, nn.Linear(2, 1), tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value) for name, value in WEIGHTS.items())


def test_training_states_may_have_numbers_of_numpy(tmp_path):
    state = {
        "numbers": [np.float64(0.5), np.float32(0.1), np.int64(3), np.bool_(True)],
        "array": np.arange(4, dtype=">u4").reshape(2, 2),
        "random": np.random.RandomState(3).get_state(),
        "type": np.dtype("float16"),
    }
    torch.save({"model": WEIGHTS, "trainer": state}, tmp_path / "a.pth")
    found = read_checkpoint(str(tmp_path / "a.pth"))["trainer"]
    assert found["numbers"] == state["numbers"]
    assert [type(number) for number in found["numbers"]] == [type(n) for n in state["numbers"]]
    assert np.array_equal(found["array"], state["array"])
    assert np.array_equal(found["random"][1], state["random"][1])
    assert found["type"] == np.float16


@pytest.mark.parametrize("new", [False, True])
def test_numbers_of_other_versions_of_numpy(tmp_path, new):
    """Their module was renamed in NumPy 2."""
    path = tmp_path / "a.pth"
    torch.save({"model": ARRAYS, "number": np.float64(0.5)}, path)
    renamed = tmp_path / "renamed.pth"
    old, other = (b"numpy.core", b"numpy._core") if new else (b"numpy._core", b"numpy.core")
    with zipfile.ZipFile(path) as theirs, zipfile.ZipFile(renamed, "w") as ours:
        for item in theirs.infolist():
            content = theirs.read(item)
            if item.filename.endswith("data.pkl"):
                content = content.replace(old, other)
            ours.writestr(item, content)
    content = read_checkpoint(str(renamed))
    assert content["number"] == 0.5
    assert torch.equal(content["model"]["weight"], WEIGHTS["weight"])


# Broken files


def saved(ending: str) -> bytes:
    buffer = io.BytesIO()
    if ending == "pkl":
        return pickle.dumps({"model": ARRAYS, "__author__": "zoo"}, 4)
    if ending == "safetensors":
        from safetensors.torch import save

        return save(WEIGHTS)
    torch.save({"model": WEIGHTS, "iteration": 3}, buffer)
    return buffer.getvalue()


FILES = {ending: saved(ending) for ending in ("pth", "pkl", "safetensors")}


def read_or_refused(folder: Path, ending: str, content: bytes) -> dict[str, torch.Tensor] | None:
    path = folder / f"broken.{ending}"
    path.write_bytes(content)
    try:
        return read_checkpoint(str(path))["model"]
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert str(error).isprintable()
        return None


@pytest.mark.faults
@pytest.mark.parametrize("ending", FILES)
def test_a_truncated_file_is_one_line(tmp_path_factory, ending):
    folder, whole = tmp_path_factory.mktemp("broken"), FILES[ending]

    @given(st.integers(0, len(whole) - 1))
    def check(length: int) -> None:
        assert read_or_refused(folder, ending, whole[:length]) is None

    check()
    for length in (0, 1, len(whole) - 1):
        assert read_or_refused(folder, ending, whole[:length]) is None


@pytest.mark.faults
def test_a_flipped_bit_is_one_line_or_harmless(tmp_path_factory):
    folder, whole = tmp_path_factory.mktemp("broken"), FILES["pth"]

    @given(st.integers(0, len(whole) - 1), st.integers(0, 7))
    def check(place: int, bit: int) -> None:
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        weights = read_or_refused(folder, "pth", bytes(broken))
        for name in weights or ():
            assert torch.equal(weights[name], WEIGHTS[name])

    check()


@pytest.mark.faults
@pytest.mark.parametrize("ending", FILES)
def test_other_bytes_are_one_line(tmp_path_factory, ending):
    folder, whole = tmp_path_factory.mktemp("broken"), FILES[ending]

    @given(st.integers(0, len(whole)), st.binary(min_size=1, max_size=40))
    def check(place: int, content: bytes) -> None:
        read_or_refused(folder, ending, whole[:place] + content + whole[place + len(content) :])

    check()


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
GLOBALS = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\ndtype\n", b"cbuiltins\nlist\n"]
VALUES = [b"K\x01", b"I7\n", b"X\x02\0\0\0f8", b"\x8c\x05model", b"]", b"}", b"(", b")", b"t", b"R"]


@pytest.mark.faults
def test_any_pickle_is_read_or_refused(tmp_path_factory):
    """Of all operations of pickles, in any order; none that makes a value calls a function."""
    folder = tmp_path_factory.mktemp("pickles")
    words = st.sampled_from(OPCODES) | st.sampled_from(GLOBALS + VALUES) | st.binary(max_size=3)

    @given(st.lists(words, max_size=30))
    def check(program: list[bytes]) -> None:
        with mock.patch("os.system") as system, mock.patch("builtins.eval") as evaluate:
            read_or_refused(folder, "pkl", b"\x80\x04" + b"".join(program) + b".")
        assert not system.called
        assert not evaluate.called

    check()


@pytest.mark.faults
@pytest.mark.parametrize("ending", FILES)
def test_a_damaged_file_is_told_from_another_models(tmp_path, ending):
    (tmp_path / f"half.{ending}").write_bytes(FILES[ending][: len(FILES[ending]) // 2])
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint, or damaged"):
        read_checkpoint(str(tmp_path / f"half.{ending}"))


@pytest.mark.faults
@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ending", ["pth", "pkl", "safetensors"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, complete, value, ending):
    weights = {"weight": torch.tensor([[1.0, 2.0]]).half(), "bias": torch.tensor([value])}
    path = tmp_path / f"nan.{ending}"
    if ending == "pkl":
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    elif ending == "pth":
        torch.save({"model": weights}, path)
    else:
        save_file(weights, path)
    model = nn.Linear(2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"nan\.{ending}: bias is infinite or nan"):
        PanopticFPNCheckpointer(model, complete=complete).load(str(path))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
