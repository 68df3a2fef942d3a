"""Exported models say what the model says in PyTorch."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from PIL import Image

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.config import resolve_config
from panoptic_fpn_ext.export import OnnxModel, export_onnx, onnx_file
from panoptic_fpn_ext.export.agreement import compared, outputs_of
from panoptic_fpn_ext.export.resampling import resized
from panoptic_fpn_ext.export.torchscript import TorchScriptModel, export_torchscript

from ..conftest import CONFIG, REPOSITORY, SMALL

onnxruntime = pytest.importorskip("onnxruntime")
EVERYTHING = [  # of a network with random weights
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.1"),
    *("MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "16"),
]
NOTHING = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"]
SIZES = ((64, 64), (1, 50), (90, 33), (48, 200), (3, 3))
SETTINGS = {
    "panoptic FPN": [],
    "semantic FPN": ["MODEL.META_ARCHITECTURE", "SemanticFPN"],
    "two networks": ["MODEL.META_ARCHITECTURE", "TwoNetworkPanopticFPN"],
    "cascade": [
        *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    ],
    "groups": ["MODEL.BACKBONE.NAME", "build_resnet_grouped_fpn_backbone", "MODEL.FPN.GROUPS", "2"],
    "concat and NMS": [
        *("MODEL.SEM_SEG_HEAD.AGGREGATION", "concat"),
        *("MODEL.PANOPTIC_FPN.COMBINE.NMS_THRESH", "0.4"),
    ],
    "things never stuff": ["MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS", "[0, 2]"],
}


def config(*options: str) -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(CONFIG)
    small = ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96", "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*small, *EVERYTHING, *options])
    return resolve_config(cfg)


def images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def in_pytorch(cfg: CfgNode, model: torch.nn.Module, image: np.ndarray) -> dict[str, np.ndarray]:
    sizes = [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
    resize = T.ResizeShortestEdge(*sizes).get_transform(image)
    pixels = torch.as_tensor(resize.apply_image(image).transpose(2, 0, 1).copy())
    inputs = {"image": pixels, "height": image.shape[0], "width": image.shape[1]}
    return outputs_of(model, inputs)


@pytest.fixture
def exported(shapes, tmp_path) -> Callable:
    """From options to a config, a model with random weights, and the model exported."""

    def exported(*options: str, form: str = "onnx"):
        cfg = config(*options)
        model = build_model(cfg).eval()
        if form == "torchscript":
            export_torchscript(cfg, model, tmp_path / "model.ts")
            return cfg, model, TorchScriptModel(tmp_path / "model.ts")
        export_onnx(cfg, model, tmp_path / "model.onnx")
        return cfg, model, OnnxModel(tmp_path / "model.onnx", threads=1)

    return exported


@pytest.mark.parametrize("name", SETTINGS)
def test_says_what_the_model_says_of_images_of_any_size(exported, name) -> None:
    """Not resized: that may change a pixel by one, and a network that has learned nothing finds
    all boxes and classes about equally good."""
    cfg, model, onnx = exported("INPUT.MIN_SIZE_TEST", "0", *SETTINGS[name])
    counts = []
    for image in images():
        agreement = compared(in_pytorch(cfg, model, image), onnx(image))
        assert agreement.is_good, agreement
        counts.append(agreement.instances)
    if name != "semantic FPN":
        assert max(counts) >= 15


def test_torchscript_says_the_same(exported) -> None:
    cfg, model, run = exported(form="torchscript")
    for image in images():
        agreement = compared(in_pytorch(cfg, model, image), run(image))
        assert agreement.is_good, agreement


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (40, 200), (300, 100), (64, 64)])
def test_resizes_to_the_test_size(exported, size) -> None:
    """To the bit: what a network makes of pixels that differ by 1 is another thing."""
    cfg, model, onnx = exported("MODEL.META_ARCHITECTURE", "SemanticFPN")
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    agreement = compared(in_pytorch(cfg, model, image), onnx(image))
    assert agreement.is_good, agreement


def test_no_instances_at_all(exported) -> None:
    cfg, model, onnx = exported(*NOTHING)
    for image in images():
        agreement = compared(in_pytorch(cfg, model, image), onnx(image))
        assert agreement.instances == 0
        assert agreement.labels > 0.99


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ("['sem_seg']", {"sem_seg"}),
        ("['instances']", {"boxes", "scores", "classes", "masks"}),
    ],
)
def test_has_the_outputs_of_the_config_and_no_others(exported, outputs, names) -> None:
    _, _, onnx = exported("MODEL.PANOPTIC_FPN.OUTPUTS", outputs)
    assert set(onnx(images()[0])) == names


def test_thresholds_are_inputs_that_may_be_left_out(exported) -> None:
    _, _, onnx = exported()
    image = images()[0]
    assert onnx(image)["segment_isthing"].sum() > 1
    assert onnx(image, score_threshold=1.1)["segment_isthing"].sum() == 0
    every = onnx(image, score_threshold=1.1, stuff_area_limit=0)
    assert not (every["panoptic_seg"] == 0).all()
    assert (onnx(image, score_threshold=1.1, stuff_area_limit=1e6)["panoptic_seg"] == 0).all()


def test_areas_are_those_of_the_map(exported) -> None:
    _, _, onnx = exported()
    found = onnx(images()[0])
    counts = np.bincount(found["panoptic_seg"].reshape(-1))
    assert counts[1:].tolist() == found["segment_area"].tolist()
    assert found["segment_id"].tolist() == list(range(1, len(counts)))


def test_metadata_tell_the_label_space(exported) -> None:
    cfg, _, onnx = exported()
    facts = onnx.session.get_modelmeta().custom_metadata_map
    things = json.loads(facts["thing_classes"])
    assert len(things) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert len(json.loads(facts["semantic_classes"])) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert facts["input_format"] == cfg.INPUT.FORMAT
    assert len(facts["weights_sha256"]) == 64


@pytest.mark.parametrize("sizes", [((48, 64), (80, 107)), ((300, 20), (31, 9)), ((1, 5), (64, 3))])
def test_resizes_as_pillow_does(sizes) -> None:
    (before, after), random = sizes, np.random.default_rng(1)
    image = random.integers(0, 256, (*before, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(after[::-1], Image.BILINEAR))
    assert np.array_equal(resized(torch.from_numpy(image), torch.tensor(after)), expected)


class Resized(torch.nn.Module):
    def forward(self, image: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return resized(image, size)


def test_onnx_resizes_as_pillow_does(tmp_path) -> None:
    """In a graph that was made from another size."""
    example = torch.zeros(50, 60, 3, dtype=torch.uint8), torch.tensor([70, 80])
    file, axes = str(tmp_path / "resized.onnx"), {"image": {0: "height", 1: "width"}}
    names = {"input_names": ["image", "size"], "dynamic_axes": axes, "opset_version": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the exporter of traces is the older one
        torch.onnx.export(Resized(), example, file, **names, **onnx_file._OLDER_EXPORTER)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    for before, after in [((48, 64), (80, 107)), ((300, 20), (31, 9)), ((64, 48), (64, 47))]:
        image = random.integers(0, 256, (*before, 3), dtype=np.uint8)
        (found,) = session.run(None, {"image": image, "size": np.array(after)})
        expected = Image.fromarray(image).resize(after[::-1], Image.BILINEAR)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, True]"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
        ("INPUT.FORMAT", "L"),
    ],
)
def test_what_cannot_be_exported_is_named_by_its_key(shapes, tmp_path, options) -> None:
    with pytest.raises(UserError, match=f"{options[0]} .*cannot be exported") as caught:
        export_onnx(config(*options), torch.nn.Identity(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_part_with_an_unknown_operator_is_named_by_its_key(shapes, tmp_path) -> None:
    class Special(Backbone):
        def __init__(self, plain: Backbone) -> None:
            super().__init__()
            self.plain = plain

        size_divisibility = property(lambda self: self.plain.size_divisibility)

        def output_shape(self):
            return self.plain.output_shape()

        def forward(self, x):
            return self.plain(x + torch.special.bessel_j0(x))

    if "build_special_backbone" not in BACKBONE_REGISTRY:

        def build_special_backbone(cfg, input_shape):
            return Special(BACKBONE_REGISTRY.get("build_resnet_fpn_backbone")(cfg, input_shape))

        BACKBONE_REGISTRY.register(build_special_backbone)
    cfg = config("MODEL.BACKBONE.NAME", "build_special_backbone")
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME build_special_backbone") as caught:
        export_onnx(cfg, build_model(cfg).eval(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_opset_with_another_roi_align_is_refused(shapes, tmp_path) -> None:
    with pytest.raises(UserError, match="--opset 15"):
        export_onnx(config(), torch.nn.Identity(), tmp_path / "model.onnx", opset=15)


WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "detectron2", "torchvision", "panoptic_fpn_ext", "cv2", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_tool_checks_and_the_example_runs_without_pytorch(trained, shapes, tmp_path) -> None:
    tool = [sys.executable, "tools/export_model.py", "--config-file", CONFIG]
    options = [*SMALL, "INPUT.MIN_SIZE_TEST", "0", "MODEL.DEVICE", "cpu"]
    options += ["MODEL.WEIGHTS", trained / "model_final.pth"]
    run = subprocess.run(
        [*tool, "--output", tmp_path, "--check", shapes / "val", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "of 11 images agree" in run.stdout

    example = ["examples/onnx_predict.py", tmp_path / "model.onnx", shapes / "val"]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *example, "--output", tmp_path / "predictions"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    content = json.loads((tmp_path / "predictions/panoptic.json").read_text())
    truth = json.loads((shapes / "annotations/panoptic_val.json").read_text())
    known = {category["id"] for category in truth["categories"]}
    assert len(content["annotations"]) == 6
    for entry in content["annotations"]:
        png = np.asarray(Image.open(tmp_path / "predictions/panoptic" / entry["file_name"]))
        ids = {segment["id"] for segment in entry["segments_info"]}
        assert set(np.unique(png[..., 0] + 256 * png[..., 1].astype(int))) - {0} == ids
        assert {segment["category_id"] for segment in entry["segments_info"]} <= known
        assert (tmp_path / "predictions/overlays" / entry["file_name"]).is_file()


def test_int8_finds_the_same_categories(trained, shapes, tmp_path, monkeypatch) -> None:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import export_model

    monkeypatch.setattr(export_model, "MIN_CATEGORIES", 0.9)  # of one that has learned little
    weights = "MODEL.WEIGHTS", str(trained / "model_final.pth"), "MODEL.DEVICE", "cpu"
    arguments = ["--config-file", str(trained / "config.yaml"), "--output", str(tmp_path)]
    sizes = {}
    for precision in ([], ["--int8", str(shapes / "train")]):
        options = export_model.parse([*arguments, *precision, "--check", "shapes_val", *weights])
        assert export_model.export(options) == 0
        sizes[bool(precision)] = (tmp_path / "model.onnx").stat().st_size
    assert sizes[True] < 0.5 * sizes[False]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    facts = OnnxModel(tmp_path / "model.onnx").session.get_modelmeta().custom_metadata_map
    assert facts["precision"] == "int8"
    assert facts["input_format"] == "RGB"


def test_the_tool_says_mistakes_in_one_line(trained, shapes, tmp_path) -> None:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import export_model

    weights = ["MODEL.WEIGHTS", str(trained / "model_final.pth"), "MODEL.DEVICE", "cpu"]
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--output", str(tmp_path / "file" / "folder"), *weights], "--output"),
        (["--output", str(tmp_path)], "MODEL.WEIGHTS"),
        (["--output", str(tmp_path), "--check", "nowhere", *weights], "--check nowhere"),
        (["--output", str(tmp_path), "--int8", "nowhere", *weights], "--int8 nowhere"),
        (["--output", str(tmp_path), "--format", "torchscript", "--int8", "x", *weights], "--int8"),
    ):
        with pytest.raises(UserError, match=message):
            export_model.export(export_model.parse(["--config-file", CONFIG, *arguments]))
