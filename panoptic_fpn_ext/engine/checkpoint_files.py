"""Checkpoint files of any origin: read without running what they hold, written whole or not at all.

Pickles, which ``.pth`` and ``.pkl`` files are, may call any function while they are read. Here they
build tensors, arrays and containers; one that asks for more is refused.
"""

import builtins
import codecs
import functools
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open

from ..errors import UserError

# What pickles of arrays and NumPy's numbers call, under its names before and since NumPy 2.
_NUMPY = {
    f"numpy.{core}.{module}.{function.__name__}": function
    for core in ("core", "_core")
    for module, function in (
        ("multiarray", np.zeros(1).__reduce__()[0]),  # _reconstruct
        ("multiarray", np.float64(0).__reduce__()[0]),  # scalar
        ("numeric", np.zeros(1).__reduce_ex__(5)[0]),  # _frombuffer
    )
}
_ALLOWED = {
    **_NUMPY,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,  # bytes in pickles that Python 2 can read
    "collections.OrderedDict": OrderedDict,
    **{
        f"{module}.{name}": getattr(builtins, name)
        for module in ("builtins", "__builtin__")
        for name in ("bytearray", "complex", "dict", "frozenset", "list", "set", "tuple")
    },
}


def _renamed(function: Callable, full_name: str) -> Callable:
    @functools.wraps(function)
    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__module__, _, renamed.__name__ = full_name.rpartition(".")
    renamed.__qualname__ = renamed.__name__
    return renamed


# PyTorch knows what it may call by the name it has; not as a context, which PyTorch 2.4 lacks.
torch.serialization.add_safe_globals(
    [
        *(_renamed(function, name) for name, function in _NUMPY.items()),
        *(np.ndarray, np.dtype, codecs.encode),
        *{type(np.dtype(letter)) for letter in "?bhilqBHILQefdgFDGSUV"},
    ]
)


class DamagedCheckpoint(UserError):
    """A file that is no checkpoint, or not a whole one."""


class _Refused(Exception):
    """What a file asks for, beyond weights."""


# The one in Python: in that in C a damaged number of five bytes may fill the memory.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (full_name := f"{module}.{name}") not in _ALLOWED:
            raise _Refused(full_name)
        return _ALLOWED[full_name]


def read_checkpoint(path: str, name: str = "") -> dict[str, Any]:
    """Read a checkpoint as Detectron2's ``DetectionCheckpointer`` does, but run nothing in it.

    Args:
        path: the file. ``.pkl`` is Detectron2's or Detectron1's model zoo, ``.pyth`` pycls,
            ``.safetensors`` what it says, all others PyTorch.
        name: what errors call it; by default its path.

    Returns:
        A dict: ``"model"`` has the weights, all of them tensors; ``"matching_heuristics"`` and
        ``"__author__"`` say, where they are, that their names are another model's; the training
        state, if any, is as it was saved.

    Raises:
        DamagedCheckpoint: it is no checkpoint, or not a whole one.
        UserError: it asks for more than weights and numbers.
    """
    name = name or path
    try:
        content = _READERS.get(os.path.splitext(path)[1], _read_pytorch)(path)
        weights = content["model"]
        for key, value in weights.items():
            if isinstance(value, np.ndarray):
                weights[key] = torch.from_numpy(value)
            elif not isinstance(value, torch.Tensor):
                raise ValueError(f"{key} is of type {type(value).__name__}")
    except _Refused as refusal:
        raise UserError(
            f"{name}: asks for {_line(refusal)}, which weights have no need of; nothing of it was "
            "run (docs/RELIABILITY.md)"
        ) from None
    except Exception as error:  # unpickling raises whatever it likes on other files
        raise DamagedCheckpoint(
            f"{name}: not a checkpoint, or damaged ({_line(error)}); copy it again"
        ) from error
    return content


def is_whole(path: str) -> bool:
    """Whether a checkpoint of PyTorch's is as it was written: its parts have their checksums.

    A piece of it is in memory at a time.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises many kinds on damaged archives
        return False


def _line(error: Exception) -> str:
    """The first line of its message, which may have parts of the file in it."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line[:200])


def _read_pytorch(path: str) -> dict[str, Any]:
    content = _load_pytorch(path)
    return content if "model" in content else {"model": content}


def _read_pycls(path: str) -> dict[str, Any]:
    weights = _load_pytorch(path)["model_state"]
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _load_pytorch(path: str) -> Any:
    # PyTorch checks no sums, and before 2.6 it ran programs in archives even with weights_only.
    if tarfile.is_tarfile(path):
        raise _Refused("a tar archive")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the check sum of {damaged} is another")
            if any(os.path.basename(name) == "constants.pkl" for name in archive.namelist()):
                raise _Refused("a TorchScript program")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        if wanted := re.search(r"(?:GLOBAL|but got) (?:<class ')?([\w.]+)", message):
            raise _Refused(wanted[1]) from error
        raise ValueError(message) from error


def _read_model_zoo(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = _Unpickler(file, encoding="latin1").load()
    if "model" in content and "__author__" in content:
        return content
    # Detection models of Detectron1 have "blobs", its ImageNet models do not.
    weights = content.get("blobs", content)
    weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_safetensors(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt", device="cpu") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    content = {"model": weights, "__author__": metadata.get("__author__", "")}
    return {**content, "matching_heuristics": metadata.get("matching_heuristics") == "True"}


_READERS = {
    ".pkl": _read_model_zoo,
    ".pyth": _read_pycls,
    ".safetensors": _read_safetensors,
}


class _Writer:
    """A file for PyTorch, which in C++ has no use for an exception: it is kept, not raised."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            return len(content)

    def flush(self) -> None:
        pass


@contextmanager
def whole_file(path: str) -> Iterator[_Writer]:
    """A file to write, which takes its place, whole and on the disk, when the block is left.

    Raises:
        UserError: it cannot be written; what was there before is there still.
    """
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            writer = _Writer(file)
            yield writer
            if writer.error:
                raise writer.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); what was saved before is there "
                "still: put that right, and --resume goes on"
            ) from error
        raise
    with suppress(OSError):  # not every file system can
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
