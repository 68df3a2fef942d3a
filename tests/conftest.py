"""What several test modules share: small configs and random model inputs."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Kernels for GPUs are tested on CPUs too; Triton, which PyTorch imports, asks for this first.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"

# Before PyTorch is loaded, as in panoptic_fpn_ext.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import setuptools  # noqa: F401  (before anything imports Python's distutils, which it replaces)
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "datasets"))  # for make_shapes
# The package registers its datasets under this folder when it is imported.
DATASETS = tempfile.TemporaryDirectory(prefix="panoptic_fpn_ext_tests_")
os.environ["DETECTRON2_DATASETS"] = DATASETS.name

CONFIG = "configs/quickstart.yaml"
# Options that make a run on the tiny Shapes take seconds, and still predict something.
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "2", "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "16"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"),
    *("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.02"),
]

# The environment of programs whose messages are compared: only the mended Detectron2 is silent.
MENDED = find_spec("detectron2._compiled_ops") is not None
QUIET = os.environ if MENDED else {**os.environ, "PYTHONWARNINGS": "ignore"}


def train_net(*arguments: str | Path, device: str = "cpu") -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    options = ["MODEL.DEVICE", device] if torch.cuda.is_available() else []
    return subprocess.run(
        [sys.executable, "train_net.py", *map(str, arguments), *options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def shapes() -> Path:
    """A tiny Shapes, where ``shapes_train`` and ``shapes_val`` expect it; its root."""
    from make_shapes import make_shapes

    root = Path(os.environ["DETECTRON2_DATASETS"]) / "shapes"
    make_shapes(root, size=(64, 64), num_images={"train": 12, "val": 6}, seed=0)
    return root


@pytest.fixture(scope="session")
def train(shapes, tmp_path_factory) -> Callable[[str], Path]:
    """From a device to the output folder of a training run of 12 iterations on it."""

    @functools.cache
    def train(device: str) -> Path:
        output = tmp_path_factory.mktemp("trained")
        arguments = "--config-file", CONFIG, *SMALL, "SOLVER.MAX_ITER", "12", "OUTPUT_DIR", output
        run = train_net(*arguments, device=device)
        assert run.returncode == 0, run.stderr[-3000:]
        return output

    return train


@pytest.fixture(scope="session")
def trained(train) -> Path:
    """The output folder of one on the CPU."""
    return train("cpu")


@pytest.fixture
def trained_on_device(train, device: torch.device) -> Path:
    return train(device.type)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


CPU = torch.device("cpu")


@functools.cache
def triton_is_out() -> bool:
    """Whether kernels cannot be tested here: Triton's interpreter before 3.8 takes arrays of one
    element for numbers, which NumPy does not from 2.5 on."""
    from panoptic_fpn_ext.layers import kernels

    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        kernels.upsampled_labels(torch.zeros(2, 1, 1), stride=1, image_size=(1, 1), size=(1, 1))
    except Exception as error:
        if "only 0-dimensional arrays can be converted" not in str(error):
            raise
        return True
    return False


def needs_triton() -> pytest.MarkDecorator:
    reason = "Triton's interpreter does not run on this NumPy"
    return pytest.mark.skipif(triton_is_out(), reason=reason)


def devices(num_gpus: int = 1) -> list:
    """The CPU, and GPUs where there are so many."""
    if torch.cuda.device_count() < num_gpus:
        return [CPU]
    return [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def on_devices(found: list) -> pytest.MarkDecorator:
    """Instead of all that the fixture ``device`` has."""
    return pytest.mark.parametrize("device", found, indirect=True, ids=lambda d: d.type)


DEVICES = devices()
on_cpu = on_devices([CPU])  # what is the same everywhere


@pytest.fixture(params=DEVICES, ids=lambda device: device.type)
def device(request) -> Iterator[torch.device]:
    """The CPU, and a GPU where there is one; there in float32 itself, not in TF32."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    yield request.param
    convolutions.allow_tf32, products.allow_tf32 = before


@pytest.fixture
def rounding(device: torch.device) -> dict[str, float]:
    """Of ``assert_close`` where it has its defaults on CPUs; GPUs convolve in many ways."""
    return {} if device.type == "cpu" else {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """Tensors that a test makes are on the device."""
    with device:
        torch.manual_seed(0)
        yield


@pytest.fixture
def detectron2_cfg(device: torch.device) -> CfgNode:
    """A small PanopticFPN of Detectron2: 3 things, 4 semantic classes."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.DEVICE = device.type
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT = 0.5
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.3
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 64
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture
def ext_cfg(detectron2_cfg: CfgNode) -> CfgNode:
    """The same model of ours; only the two names differ."""
    cfg = detectron2_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPNExt"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticFPNHead"
    return cfg


@pytest.fixture
def training_batch() -> list[dict]:
    """Two images of different sizes with instances and semantic ground truth."""
    batch = []
    for height, width in ((96, 128), (80, 100)):
        instances = Instances((height, width))
        masks = torch.zeros(3, height, width, dtype=torch.bool)
        boxes = []
        for k in range(3):
            x, y, w, h = 10 + 20 * k, 8 + 12 * k, 24 + 6 * k, 20 + 9 * k
            masks[k, y : y + h, x : x + w] = True
            boxes.append([x, y, x + w, y + h])
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.tensor([0, 1, 2])
        instances.gt_masks = BitMasks(masks)
        sem_seg = torch.randint(0, 4, (height, width))
        sem_seg[:6] = 255
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "sem_seg": sem_seg})
    return batch


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium, driver_file = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver_file):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1240,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_file))
    yield driver
    driver.quit()


def moved(output: Any, device: torch.device) -> Any:
    """What a model returns, on a device."""
    if isinstance(output, dict):
        return {key: moved(value, device) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output)(moved(value, device) for value in output)
    return output.to(device) if hasattr(output, "to") else output


def assert_same_outputs(found: dict, expected: dict) -> None:
    """The outputs of one image are another model's, up to rounding."""
    assert set(found) == set(expected)
    torch.testing.assert_close(found["sem_seg"], expected["sem_seg"], atol=1e-4, rtol=1e-3)
    ours, theirs = found["instances"], expected["instances"]
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=0)
    boxes = ours.pred_boxes.tensor, theirs.pred_boxes.tensor
    torch.testing.assert_close(*boxes, atol=1e-2, rtol=1e-4)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    assert (ours.pred_masks != theirs.pred_masks).float().mean() < 1e-3
    assert (found["panoptic_seg"][0] != expected["panoptic_seg"][0]).float().mean() < 1e-3
    segments = [
        [(s["id"], s["isthing"], s["category_id"]) for s in outputs["panoptic_seg"][1]]
        for outputs in (found, expected)
    ]
    assert segments[0] == segments[1] != []
