"""What is wrong on the command line is said in one line, before anything is written."""

import argparse
import importlib.util
import json
import os
from importlib.machinery import ModuleSpec

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import setup
from panoptic_fpn_ext.evaluation import EVALUATOR_REGISTRY, needs

from ..data.tiny_dataset import TinyDataset

CONFIG = "configs/quickstart.yaml"


BEST = "TEST.EVAL_PERIOD", "5", "TEST.BEST_METRIC"
ONE_OUTPUT = "MODEL.PANOPTIC_FPN.OUTPUTS", "['sem_seg']"
TWO = "('shapes_val', 'shapes_train')"


def arguments(config_file=CONFIG, *opts, eval_only=False, num_gpus=1):
    return argparse.Namespace(
        config_file=config_file,
        opts=list(opts),
        eval_only=eval_only,
        resume=False,
        num_gpus=num_gpus,
        num_machines=1,
    )


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_classes_come_from_the_dataset(shapes):
    cfg = setup(arguments())
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (5, 6)
    assert cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS == [0]
    assert cfg.is_frozen()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (arguments("nowhere.yaml"), "--config-file nowhere.yaml: no such file"),
        (arguments(""), "--config-file is needed"),
        (arguments(CONFIG, "MODEL.WEIGHT", "x"), "did you mean MODEL.WEIGHTS?"),
        (arguments(CONFIG, "SOLVER.MAX_ITER"), "pairs KEY VALUE"),
        (arguments(CONFIG, "SOLVER.MAX_ITER", "3", "--resume"), "--resume after KEY VALUE"),
        (arguments(CONFIG, "SOLVER.MAX_ITER", "many"), "SOLVER.MAX_ITER"),
        (arguments(CONFIG, "MODEL.META_ARCHITECTURE", "PanopticFpnExt"), "mean PanopticFPNExt?"),
        (arguments(CONFIG, "SOLVER.OPTIMIZER", "LION"), "allowed are ['SGD', 'ADAMW']"),
        (arguments(CONFIG, "DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty"),
        (arguments(CONFIG, "DATASETS.TEST", "('shape_val',)"), "did you mean shapes_val?"),
        (arguments(CONFIG, "DATASETS.TEST", "('coins_val',)"), "DATASETS.PANOPTIC registers one"),
        (
            arguments(CONFIG, "DATASETS.TRAIN", "('shapes_train')"),
            "DATASETS.TRAIN is shapes_train, expected something like ('shapes_train',); in YAML a "
            'list, or with a comma even for one: ("shapes_train",)',
        ),
        (arguments(num_gpus=3), "IMS_PER_BATCH 4 is not a multiple of the 3 processes"),
        (arguments(CONFIG, "MODEL.DEVICE", "gpu"), "MODEL.DEVICE 'gpu' is no device: cuda, or cpu"),
        (arguments(CONFIG, "OUTPUT_DIR", __file__), "OUTPUT_DIR"),
        (
            arguments(CONFIG, "MODEL.SEM_SEG_HEAD.CONVS_DIM", "48"),
            "MODEL.SEM_SEG_HEAD.NORM GN does not go with MODEL.SEM_SEG_HEAD.CONVS_DIM 48",
        ),
        (
            arguments(CONFIG, "MODEL.FPN.NORM", "LayerNorm"),
            "MODEL.FPN.NORM 'LayerNorm': Detectron2",
        ),
        (
            arguments(CONFIG, "SOLVER.CHECKPOINT_KEEP", "-1"),
            "CHECKPOINT_KEEP -1: must be 0 or more",
        ),
        (
            arguments(CONFIG, *BEST, "panoptic_seg/PQ", "TEST.PATIENCE", "-1"),
            "TEST.PATIENCE -1: must be 0 or more",
        ),
        (
            arguments(CONFIG, *BEST, "panoptic_seg/pq"),
            "TEST.BEST_METRIC 'panoptic_seg/pq': no evaluation of this run finds it; did you mean "
            "panoptic_seg/PQ?",
        ),
        (arguments(CONFIG, *BEST, "PQ"), "did you mean panoptic_seg/PQ?"),
        (
            arguments(CONFIG, *BEST, "validation/total_loss"),
            "no evaluation of this run finds it; which TEST.LOSS True computes",
        ),
        (
            arguments(CONFIG, *BEST, "panoptic_seg/boundary_PQ"),
            "TEST.BEST_METRIC 'panoptic_seg/boundary_PQ': no evaluation of this run finds it",
        ),
        (
            arguments(CONFIG, *BEST, "panoptic_seg/PQ", *ONE_OUTPUT),
            "TEST.BEST_METRIC 'panoptic_seg/PQ': no evaluation of this run finds it",
        ),
        (
            arguments(CONFIG, *BEST, "sem_seg/mIoU", "DATASETS.TEST", TWO),
            "did you mean shapes_val/sem_seg/mIoU?",
        ),
        (
            arguments(CONFIG, *BEST, "sem_seg/mIoU", "DATASETS.TEST", "()"),
            "no evaluation of this run finds it; of which DATASETS.TEST is empty",
        ),
        (arguments(CONFIG, "TEST.PICTURES", "-1"), "TEST.PICTURES -1: must be 0 or more"),
        (
            arguments(CONFIG, "TRACKING.WRITER", "weights"),
            "TRACKING.WRITER 'weights': allowed are ['', 'wandb', 'mlflow']",
        ),
        (arguments(eval_only=True), "--eval-only needs weights"),
        (
            arguments(CONFIG, "MODEL.WEIGHTS", "nowhere.pth", eval_only=True),
            "MODEL.WEIGHTS nowhere.pth: no such file",
        ),
    ],
)
def test_mistakes_are_one_line(shapes, args, message):
    with pytest.raises(UserError) as error:
        setup(args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_package_of_curves_that_is_not_installed(shapes, monkeypatch, package):
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name == package else ModuleSpec(name, None)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    options = () if package == "tensorboard" else ("TRACKING.WRITER", package)
    with pytest.raises(UserError, match=f"{package} is not installed: pip install {package}$"):
        setup(arguments(CONFIG, *options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL: [", "while parsing"),
        ("MODEL:\n  WEIGHTZ: x\n", "Non-existent config key: MODEL.WEIGHTZ; did you mean"),
        ("_BASE_: missing.yaml\n", "missing.yaml"),
        ("SOLVER:\n  MAX_ITER: soon\n", "MAX_ITER"),
    ],
)
def test_faulty_config_files_are_one_line_that_names_them(tmp_path, content, message):
    path = tmp_path / "faulty.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        setup(arguments(str(path)))
    assert message in str(error.value)
    assert "faulty.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fault", ["json", "png", "image"])
def test_what_evaluation_needs_is_checked_before_training(tmp_path, split, fault):
    datasets = {name: TinyDataset(tmp_path / name) for name in ("train", "val")}
    broken = datasets[split]
    if fault == "json":
        broken.annotation(2)["segments_info"][0]["category_id"] = 55
        broken.write()
    else:
        (broken.png(2) if fault == "png" else broken.images / "2.jpg").unlink()
    registered = [
        {"name": f"tiny_{name}", **{key: str(path) for key, path in data.paths().items()}}
        for name, data in datasets.items()
    ]
    options = "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"
    file = tmp_path / "config.yaml"
    content = {"_BASE_": os.path.abspath(CONFIG), "DATASETS": {"PANOPTIC": registered}}
    file.write_text(json.dumps(content))
    output = tmp_path / "output"
    message = {
        "json": r"image 2: segment \d+: category_id 55 is not among",
        "png": rf"dataset tiny_{split}: 1 of 4 files are missing, first .*panoptic/2\.png",
        "image": rf"dataset tiny_{split}: 1 of 4 files are missing, first .*images/2\.jpg",
    }[fault]
    try:
        with pytest.raises(UserError, match=message):
            setup(arguments(str(file), *options, "OUTPUT_DIR", str(output)))
    finally:
        for name in datasets:
            DatasetCatalog.remove(f"tiny_{name}")
            MetadataCatalog.remove(f"tiny_{name}")
    assert not output.exists()


def test_a_dataset_that_is_not_there_names_what_is_missing(monkeypatch, tmp_path):
    from detectron2.data import MetadataCatalog

    missing = tmp_path / "panoptic.json"
    monkeypatch.setitem(MetadataCatalog.get("shapes_val").__dict__, "panoptic_json", str(missing))
    with pytest.raises(UserError, match=r"shapes_val.*panoptic\.json.*datasets/README\.md"):
        setup(arguments())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("panoptic_seg/PQ", ()),
        ("panoptic_seg/PQ_th", ()),
        ("panoptic_seg/PQ-a class", ()),
        ("panoptic_seg/boundary_PQ", ("TEST.BOUNDARY_PQ", "True")),
        ("sem_seg/mIoU", ONE_OUTPUT),
        ("segm/AP", ()),
        ("bbox/AP-car", ()),
        ("validation/total_loss", ("TEST.LOSS", "True")),
        ("validation/loss_mask", ("TEST.LOSS", "True")),
        ("shapes_train/sem_seg/mIoU", ("DATASETS.TEST", TWO)),
    ],
)
def test_scores_that_will_be_found_can_be_the_best(shapes, tmp_path, name, options):
    cfg = setup(arguments(CONFIG, *BEST, name, *options, "OUTPUT_DIR", str(tmp_path)))
    assert name == cfg.TEST.BEST_METRIC


def test_of_an_evaluator_that_does_not_say_all_may_be_the_best(shapes, tmp_path, monkeypatch):
    own = needs("sem_seg")(lambda dataset_name, output_folder: None)
    monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, "own", own)
    monkeypatch.setitem(MetadataCatalog.get("shapes_val").__dict__, "evaluators", ("own",))
    setup(arguments(CONFIG, *BEST, "own/score", "OUTPUT_DIR", str(tmp_path)))


@pytest.mark.parametrize(
    ("architecture", "keys", "refused"),
    [
        ("PanopticFPNExt", {"annotations"}, True),
        ("PanopticFPNExt", {"annotations", "sem_seg_file_name"}, False),
        ("PanopticFPNExt", {"pan_seg_file_name"}, False),
        ("SemanticFPN", {"annotations"}, True),
        ("SemanticFPN", {"sem_seg_file_name"}, False),
        ("SemanticFPN", set(), True),
        ("GeneralizedRCNN", {"annotations"}, False),
        ("GeneralizedRCNN", {"sem_seg_file_name"}, True),
    ],
)
@pytest.mark.parametrize("eval_only", [False, True])
def test_losses_need_ground_truth(
    shapes, tmp_path, monkeypatch, architecture, keys, refused, eval_only
):
    image = str(shapes / "val" / "000000000001.jpg")
    record = {"file_name": image, "image_id": 1, **dict.fromkeys(keys, image)}
    monkeypatch.setitem(DatasetCatalog.data, "shapes_val", lambda: [record])
    options = ["MODEL.META_ARCHITECTURE", architecture, "OUTPUT_DIR", str(tmp_path)]
    options += ["MODEL.WEIGHTS", image]
    setup(arguments(CONFIG, *options, eval_only=eval_only))
    losses = arguments(CONFIG, *options, "TEST.LOSS", "True", eval_only=eval_only)
    if refused:
        with pytest.raises(UserError, match="TEST.LOSS: dataset 'shapes_val' has no ground truth"):
            setup(losses)
    else:
        setup(losses)
