"""The package and the ranges it is meant to work in; requirements.txt pins what is tested."""

import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import find_packages, setup

# pip builds apart from the environment it installs into: look there, not on sys.path.
SITE_PACKAGES = [
    sysconfig.get_path(kind, vars={"base": prefix, "platbase": prefix})
    for kind in ("purelib", "platlib")
    for prefix in (sys.prefix, sys.base_prefix)
]
INSTALLED = {d.metadata["Name"].lower() for d in distributions(path=SITE_PACKAGES)}

if "detectron2" not in INSTALLED:
    sys.exit(
        "panoptic_fpn_ext needs Detectron2, which is on no package index: run "
        "`python tools/install_detectron2.py` first, or build Detectron2 from its source."
    )

PACKAGE = Path(__file__).parent / "panoptic_fpn_ext" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', PACKAGE.read_text("utf-8"), re.MULTILINE)[1]

# OpenCV comes in packages that exclude each other: keep the one that is there.
OPENCV = ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
opencv = next((name for name in OPENCV if name in INSTALLED), "opencv-python")

setup(
    name="panoptic_fpn_ext",
    version=VERSION,
    description="Panoptic FPN for Detectron2: training and evaluation on any panoptic dataset",
    license="Apache-2.0",
    packages=find_packages(include=["panoptic_fpn_ext", "panoptic_fpn_ext.*"]),
    package_data={"panoptic_fpn_ext.evaluation": ["page/*"]},
    python_requires=">=3.10,<3.15",
    install_requires=[
        "cityscapesscripts>=2.2",
        "detectron2>=0.6",
        "faster-coco-eval>=1.6",
        "fvcore>=0.1.5",
        "jinja2>=3.0",
        "kornia-rs>=0.2,<0.3",
        "matplotlib>=3.7",
        "msgspec>=0.19",
        "numpy>=1.23",
        f"{opencv}>=4.5",
        "pillow>=9.1",
        "pycocotools>=2.0.6",
        "pyyaml>=5.1",
        "safetensors>=0.4",
        "tabulate>=0.8",
        "torch>=2.4",
        "torchvision>=0.19",
        "tqdm>=4.60",
    ],
    extras_require={"export": ["onnx>=1.15", "onnxruntime>=1.14"]},
)
