#!/usr/bin/env python3
"""Install Detectron2 v0.6, mended for today's PyTorch, NumPy and Pillow.

Detectron2 has made no release since v0.6 (2021) and is on no package index under its own name.
Its Python sources are, as the sdist ``pb1-detectron2==0.6``: the same files as upstream's tag
v0.6, but without the C++ ones, so pip cannot install it. This script downloads that sdist (its
hash is pinned), applies the mends listed in `MENDS`, and installs the result as a pure-Python
wheel called ``detectron2``. NMS and RoIAlign come from torchvision, on the GPU too; only
deformable and rotated layers need the compiled operators, and say so when used.

A Detectron2 that already works in this environment is left alone.

    python tools/install_detectron2.py                    # into this Python's environment
    python tools/install_detectron2.py --wheel-dir DIR    # and keep the wheel, for other machines
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# The last pip to take that sdist: from 26.3 on pip refuses it, for a direct URL in an extra.
PIP = "pip==26.2.1"
PIP_SHA256 = "71138adf1f4ca900cdb7d289c21b7494329f2332b6d85f0e1c42108c0384ed3e"
PIP_REFUSES_FROM = (26, 3)

# The number after "pure" counts revisions of what is below; an older one is replaced.
VERSION = "0.6+pure.2"
PYTHONS = ((3, 10), (3, 14))  # the oldest and the newest
DISK_SPACE = 100 * 2**20  # bytes

# Module: package. pip runs the sdist's setup.py for its name, and that imports torch; Detectron2
# imports all of them, and like upstream's, its requirements leave PyTorch and OpenCV to the user.
PREREQUISITES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "cv2": "opencv-python-headless",
    "setuptools": "setuptools",
    "pip": "pip",
}

# Projects that upstream's setup.py installs as detectron2.projects.<name>.
PROJECTS = (
    "projects/PointRend/point_rend",
    "projects/DeepLab/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab",
)


class Mend(NamedTuple):
    """One change to the sources: in the files a glob names, a regex and its replacement."""

    files: str
    pattern: str
    replacement: str
    why: str


MENDS = (
    Mend(
        "detectron2/**/*.py",
        r"\bnp\.(bool|int|float|str)\b",
        r"\1",
        "NumPy 1.24 removed its aliases of Python's types",
    ),
    Mend(
        "detectron2/layers/mask_ops.py",
        r"np\.array\(mask, copy=False\)",
        "np.asarray(mask)",
        "since NumPy 2, copy=False means 'never', and raises where a copy is needed",
    ),
    Mend(
        "detectron2/data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        "Pillow 10 removed the name",
    ),
    Mend(
        "detectron2/model_zoo/model_zoo.py",
        r"^import pkg_resources\n",
        "",
        "setuptools 82 removed pkg_resources",
    ),
    Mend(
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", os\.path\.join\((.*)\)',
        r"os.path.join(\n        os.path.dirname(__file__), \1",
        "the same: the configs lie beside this module",
    ),
    Mend(
        "detectron2/**/*.py",
        r"^from detectron2 import _C$",
        "from detectron2 import _compiled_ops as _C",
        "the sdist has no C++ sources",
    ),
    Mend(
        "detectron2/layers/nms.py",
        r"return torch\.ops\.detectron2\.nms_rotated",
        "from detectron2 import _compiled_ops\n\n    return _compiled_ops.nms_rotated",
        "the same",
    ),
    Mend(
        "detectron2/evaluation/coco_evaluation.py",
        r"^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt$",
        "COCOeval_opt = COCOeval",
        "the fast implementation is C++: pycocotools' own stands in for it",
    ),
    Mend(
        "detectron2/evaluation/coco_evaluation.py",
        r"self\._use_fast_impl = use_fast_impl$",
        "self._use_fast_impl = False",
        "the same: the log must not call the results unofficial",
    ),
    Mend(
        "detectron2/export/__init__.py",
        r"^from \.api import \*\n",
        "",
        "it needs Caffe2, which is gone from PyTorch; the other exporters do not",
    ),
    # What follows works unmended, but prints a warning on every run.
    Mend(
        "detectron2/modeling/anchor_generator.py",
        r"torch\.meshgrid\(shifts_y, shifts_x\)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        "PyTorch warns of a meshgrid without its indexing",
    ),
    Mend(
        "detectron2/projects/panoptic_deeplab/post_processing.py",
        r"(torch\.meshgrid\((?:\n .*){2})",
        r'\1\n        indexing="ij",',
        "the same",
    ),
    Mend(
        "detectron2/__init__.py",
        r"^setup_environment\(\)$",
        "import warnings\n\n"
        'warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)\n'
        r"\g<0>",
        "PyTorch warns of torch.jit.script, which importing fvcore and this package calls",
    ),
    Mend(
        "detectron2/engine/train_loop.py",
        r"from torch\.cuda\.amp import (GradScaler|autocast)",
        r"from torch.amp import \1",
        "PyTorch warns of torch.cuda.amp",
    ),
    Mend(
        "detectron2/engine/train_loop.py",
        r"with autocast\(\):",
        'with autocast("cuda"):',
        "the same",
    ),
    Mend(
        "detectron2/utils/collect_env.py",
        r"shell=True\)",
        "shell=True, stderr=subprocess.DEVNULL)",
        "where there is no compiler the shell says so, and logging the environment asks for one",
    ),
)

COMPILED_OPS = '''\
"""Stands in for detectron2._C, the compiled operators, which this build does not have."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"{name} is one of Detectron2's compiled operators (deformable and rotated layers), "
        "which this pure-Python build of v0.6 does not have: build Detectron2 from source."
    )
'''

# Upstream's requirements, less what it does not import (black, future, pydot, dataclasses) and
# without the upper bound on iopath.
PYPROJECT = f"""\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{VERSION}"
description = "Detectron2 v0.6 without its compiled operators, mended for today's PyTorch."
requires-python = ">=3.10,<3.15"
dependencies = [
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1",
    "Pillow>=7.1",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
]
urls.Source = "https://github.com/facebookresearch/detectron2/tree/v0.6"

[tool.setuptools.packages.find]
include = ["detectron2*"]

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*"]
"""


# Run in a fresh interpreter, whose path must not lead to the folder it is started from. An emptied
# folder imports as a namespace package: so what matters is imported, and each recorded file sought.
PROBE = """
import csv, sys
sys.path[:] = [folder for folder in sys.path if folder]
import detectron2.engine, detectron2.evaluation, detectron2.modeling
from importlib.metadata import PackageNotFoundError, distribution
try:
    installed = distribution("detectron2")
except PackageNotFoundError:  # a source tree on PYTHONPATH, say
    recorded = []
else:
    # Not installed.files, which from Python 3.12 on leaves out what is missing.
    lines = (installed.read_text("RECORD") or "").splitlines()
    recorded = [row[0] for row in csv.reader(lines) if row]
for file in recorded:
    if not file.endswith(".pyc") and not installed.locate_file(file).exists():
        raise ImportError(f"its file {file} is missing")
print(detectron2.__version__, "in", detectron2.__path__[0])
"""


class InstallError(Exception):
    """What went wrong, in one line."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Install Detectron2 v0.6, mended for today's PyTorch, NumPy and Pillow."
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the Detectron2 that is installed"
    )
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="keep the wheel in DIR, to carry it to another machine; "
        "it is built even where Detectron2 works already",
    )
    arguments = parser.parse_args(argv)
    try:
        run(force=arguments.force, wheel_dir=arguments.wheel_dir)
    except (InstallError, OSError) as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted", file=sys.stderr)
        return 130
    return 0


def run(*, force: bool, wheel_dir: Path | None) -> None:
    check_python()
    needed = force or not installed_and_working()
    if not needed and wheel_dir is None:
        return
    check_surroundings()
    with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
        work = Path(folder)
        tree = unpack(download(work), work)
        mend(tree)
        wheel = build_wheel(tree, work)
        if wheel_dir is not None:
            wheel_dir.mkdir(parents=True, exist_ok=True)
            print("Wheel kept:", shutil.copy(wheel, wheel_dir))
        if needed:
            install(wheel)


def check_python() -> None:
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        raise InstallError(
            f"Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} is needed; "
            f"{sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}."
        )


def check_surroundings() -> None:
    """Refuse what cannot end well, before anything is fetched."""
    missing = [package for name, package in PREREQUISITES.items() if not find_spec(name)]
    if missing:
        raise InstallError(
            f"{sys.executable} lacks {', '.join(missing)}: install the packages of "
            "requirements.txt first (`make env` does)."
        )
    for place in (tempfile.gettempdir(), site_packages()):
        free = shutil.disk_usage(place).free
        if free < DISK_SPACE:
            raise InstallError(
                f"{place} has {free / 2**20:.0f} MiB free; {DISK_SPACE / 2**20:.0f} are needed."
            )


def installed_and_working() -> bool:
    """Whether nothing need be done. A Detectron2 of the user's own is never replaced unasked."""
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        version = None
    ours = version is None or version.startswith("0.6+pure.")  # None: what is left of one, too
    works, report = probe()
    if works and (not ours or version in (None, VERSION)):
        print(f"Detectron2 {report} works: nothing to install (--force replaces it).")
        return True
    if not ours:
        raise InstallError(
            f"the Detectron2 {version} in this environment does not work ({report}): "
            "repair it, or replace it by v0.6 with --force."
        )
    return False


def probe() -> tuple[bool, str]:
    """Whether Detectron2 works in a fresh interpreter; which one it is, or why it does not."""
    done = run_quietly([sys.executable, "-c", PROBE])
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}"


def download(work: Path) -> Path:
    """Fetch the sdist, through the user's own index settings; pip checks its hash."""
    print(f"Downloading {SDIST}")
    pip = old_enough_pip(work)
    return pip_download(pip, work, SDIST, SDIST_SHA256, "--no-build-isolation", "--no-binary=:all:")


def old_enough_pip(work: Path) -> list[str]:
    """The command of a pip that takes the sdist: the environment's own, or `PIP` from its wheel."""
    own = [sys.executable, "-m", "pip"]
    version = tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])
    if version < PIP_REFUSES_FROM:
        return own
    wheel = pip_download(own, work, PIP, PIP_SHA256, "--only-binary=:all:")
    return [sys.executable, str(wheel / "pip")]


def pip_download(pip: list[str], work: Path, package: str, sha256: str, *options: str) -> Path:
    """Download one package, pinned by its hash, into a folder of its own in `work`."""
    requirements = work / f"{package}.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
    folder = work / package
    run_pip(
        pip,
        "download",
        *("--no-deps", "--require-hashes", "--retries=2", *options),
        *("--dest", str(folder), "--requirement", str(requirements)),
        doing=f"download {package}",
    )
    (file,) = folder.iterdir()
    return file


def run_pip(pip: list[str], command: str, *arguments: str, doing: str) -> None:
    """Run pip quietly; raise InstallError with the gist of what it says should it fail."""
    done = run_quietly([*pip, command, "--disable-pip-version-check", "--no-input", *arguments])
    if done.returncode != 0:
        raise InstallError(f"could not {doing}: {gist(done.stdout + done.stderr)}")


def gist(said: str) -> str:
    """The one line that matters in what a failing pip says."""
    if "DO NOT MATCH THE HASHES" in said:
        return "what the index serves does not have the SHA-256 pinned here, and is refused."
    if "NewConnectionError" in said or "NameResolutionError" in said:
        return "the package index cannot be reached."
    errors = re.findall(r"^\s*\w*error: *(.+)", said, flags=re.MULTILINE | re.IGNORECASE)
    sentences = [error for error in errors if " " in error]  # rather than pip's error-codes
    return (sentences or errors or ["pip does not say why."])[-1]


def run_quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def unpack(sdist: Path, work: Path) -> Path:
    """Unpack the sdist; return its one top folder."""
    folder = work / "unpacked"
    with tarfile.open(sdist) as archive:
        # The filter keeps members inside the folder; early patches of 3.10 and 3.11 lack it.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)
    (tree,) = folder.iterdir()
    return tree


def mend(tree: Path) -> None:
    """Lay the sources out as they are installed, then apply `MENDS`."""
    for project in PROJECTS:
        shutil.move(tree / project, tree / "detectron2" / "projects")
    for old in ("setup.py", "setup.cfg"):
        (tree / old).unlink()
    (tree / "pyproject.toml").write_text(PYPROJECT)
    (tree / "detectron2" / "_compiled_ops.py").write_text(COMPILED_OPS)

    mended = set()
    for each in MENDS:
        found = 0
        for file in sorted(tree.glob(each.files)):
            text = file.read_text(encoding="utf-8")
            text, count = re.subn(each.pattern, each.replacement, text, flags=re.MULTILINE)
            if count:
                file.write_text(text, encoding="utf-8")
                mended.add(file)
                found += count
        if not found:
            raise InstallError(f"nothing to mend in {each.files} (sought: {each.pattern}).")
    note = f"# Changed for Detectron2 {VERSION} by panoptic_fpn_ext's install_detectron2.py.\n"
    for file in mended:  # the licence asks that changed files say so
        file.write_text(note + file.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Mended {len(mended)} files")


def build_wheel(tree: Path, work: Path) -> Path:
    folder = work / "wheel"
    run_pip(
        [sys.executable, "-m", "pip"],
        "wheel",
        *("--no-deps", "--no-build-isolation", "--no-cache-dir"),
        *("--wheel-dir", str(folder), str(tree)),
        doing="build the wheel",
    )
    (wheel,) = folder.iterdir()
    return wheel


def install(wheel: Path) -> None:
    """Put the wheel in place of whatever there is; what it needs and is missing comes with it."""
    pip = [sys.executable, "-m", "pip"]
    with contextlib.suppress(InstallError):  # it fails on a half-deleted one: hence remove_remains
        run_pip(pip, "uninstall", "--yes", "detectron2", doing="uninstall")
    remove_remains()
    run_pip(pip, "install", str(wheel), doing="install the wheel")
    works, report = probe()
    if not works:
        raise InstallError(f"installed, but it does not import: {report}")
    print(f"Installed Detectron2 {report}")


def remove_remains() -> None:
    """Delete what an interrupted or half-deleted install left behind."""
    for pattern in ("detectron2", "detectron2-*.dist-info", "~etectron2*"):
        for path in site_packages().glob(pattern):
            shutil.rmtree(path)


def site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


if __name__ == "__main__":
    sys.exit(main())
