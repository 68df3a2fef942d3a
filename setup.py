"""The package and the ranges it is meant to work in; requirements.txt pins what it is tested with.

Two things it needs are not among them, so that `pip install -e .` leaves the user's own alone:
Detectron2, which is on no package index (importing panoptic_fpn_ext without it says how to get it),
and OpenCV, which Detectron2 needs too and which comes in several packages that exclude each other.
"""

from setuptools import find_packages, setup

setup(
    name="panoptic_fpn_ext",
    version="0.1.0",
    description="Panoptic FPN for Detectron2: training, evaluation and export, on any dataset",
    license="Apache-2.0",
    packages=find_packages(include=["panoptic_fpn_ext", "panoptic_fpn_ext.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=[
        "cityscapesscripts>=2.2",
        "faster-coco-eval>=1.6",
        "fvcore>=0.1.5",
        "numpy>=1.23",
        "pillow>=9.1",
        "pycocotools>=2.0.6",
        "tabulate>=0.8",
        "torch>=2.1",
        "torchvision>=0.16",
        "tqdm>=4.60",
    ],
)
