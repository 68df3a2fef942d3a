#!/usr/bin/env python3
"""Collect wheels for a machine without a network that has PyTorch, in one folder.

What is collected is this project, Detectron2 and what they and the tests need, in the versions
of this environment (`make env`), less what the other machine has. There,

    python -m pip install --no-index --no-deps FOLDER/*.whl

installs it all; `tools/gpu_check.sh` does that in an environment of its own.

    python tools/wheelhouse.py wheelhouse --python 3.12
    python tools/wheelhouse.py wheelhouse --python 3.11 --have torch torchvision
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from install_detectron2 import PYTHONS, InstallError, gist
from install_detectron2 import run as install_detectron2
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
WANTED = ("panoptic_fpn_ext", "detectron2", "pytest", "pytest-xdist", "hypothesis")
BUILT_HERE = ("panoptic-fpn-ext", "detectron2")

# Images with PyTorch have OpenCV nearly always, and its wheel alone is larger than all others.
HAVE = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless")
# Required but not needed: a backport from before Python 3.5, harmful where it comes before the
# standard library's, and what TensorBoard's debugger alone uses.
NOT_NEEDED = ("typing", "grpcio")

GLIBCS = (28, 27, 17, 12, 5)  # 2.x: any Linux since 2018 runs wheels made for these


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="to put the wheels in; *.whl there are deleted")
    parser.add_argument(
        "--python",
        default=".".join(map(str, sys.version_info[:2])),
        choices=[f"3.{minor}" for minor in range(PYTHONS[0][1], PYTHONS[1][1] + 1)],
        help="the other machine's version (default: this one's)",
    )
    parser.add_argument(
        "--have",
        nargs="*",
        default=HAVE,
        metavar="NAME",
        help="what the other machine has, with all that it needs (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        collect(args.folder, python=args.python, have=args.have)
    except (InstallError, OSError) as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    return 0


def collect(folder: Path, *, python: str, have: Iterable[str]) -> None:
    """Fill ``folder``; it is replaced only once every wheel is there."""
    has = {*needed(have, python), *NOT_NEEDED}
    packages = needed(WANTED, python, leaving_out=has)
    with tempfile.TemporaryDirectory() as work:
        wheels = Path(work) / "wheels"
        install_detectron2(force=False, wheel_dir=wheels)
        build_this_project(wheels)
        download({n: v for n, v in packages.items() if n not in BUILT_HERE}, wheels, python)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in wheels.glob("*.whl"):
            shutil.copy(wheel, folder)
    found = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in found) / 2**20
    print(f"{len(found)} wheels for Python {python}, {size:.1f} MiB, in {folder}")
    print(f"The machine must have {', '.join(have)}.")


def needed(names: Iterable[str], python: str, *, leaving_out: Iterable[str] = ()) -> dict[str, str]:
    """The installed version of each package, and of all that they require, by canonical name."""
    context = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    left_out = {canonicalize_name(name) for name in leaving_out}
    versions: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in versions or name in left_out:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise InstallError(f"{name} is not installed here: run `make env` first.") from None
        versions[name] = found.version
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate(context):
                todo.append(requirement.name)
    return versions


def build_this_project(wheels: Path) -> None:
    """Build from a copy: setuptools leaves folders beside the sources."""
    with tempfile.TemporaryDirectory() as work:
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, work)
        shutil.copytree(ROOT / "panoptic_fpn_ext", Path(work) / "panoptic_fpn_ext")
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, work)


def download(packages: dict[str, str], wheels: Path, python: str) -> None:
    """Fetch the wheels of ``packages``; what has none is pure Python, and built here."""
    print(f"Downloading {len(packages)} packages")
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", "--abi=none"]
    options += ["--abi=abi3", f"--abi=cp{python.replace('.', '')}", f"--python-version={python}"]
    options += [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in GLIBCS]
    options += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    packages = dict(packages)
    while True:
        pinned = [f"{name}=={version}" for name, version in packages.items()]
        try:
            pip("download", *options, "--dest", wheels, *pinned)
        except InstallError as error:
            missing = re.search(r"No matching distribution found for ([\w.-]+)==", str(error))
            if missing is None:
                raise
            name = canonicalize_name(missing[1])
            sdist = f"{name}=={packages.pop(name)}"
            pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, sdist)
            (built,) = wheels.glob(f"{name.replace('-', '?')}-*.whl")
            if not built.name.endswith("-none-any.whl"):
                raise InstallError(
                    f"{sdist} has no wheel for Python {python}, and is not pure Python: run this "
                    f"in an environment of Python {python} (`make env PYTHON=...`)."
                ) from error
        else:
            return


def pip(command: str, *arguments: str | Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InstallError(f"pip {command} failed: {gist(done.stdout + done.stderr)}")


if __name__ == "__main__":
    sys.exit(main())
