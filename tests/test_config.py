"""What a config leaves to its dataset, and that no key is accepted and does nothing."""

import copy

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config, register_panoptic_dataset
from panoptic_fpn_ext.config import resolve_config
from panoptic_fpn_ext.data import PanopticFPNMapper
from panoptic_fpn_ext.engine import Trainer
from panoptic_fpn_ext.evaluation import evaluator_builders
from panoptic_fpn_ext.modeling.acceleration import PRECISIONS, Acceleration

from .conftest import CPU
from .data.tiny_dataset import TinyDataset


def config(*options):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_list(["DATASETS.TEST", "()", *options])
    return cfg


@pytest.fixture
def device() -> torch.device:
    """Keys are the same everywhere."""
    return CPU


@pytest.fixture
def tiny(tmp_path):
    data = TinyDataset(tmp_path / "data", 1)
    with data.registered() as name:
        yield name, data


# Keys of Detectron2 stay as they are.


def flat(cfg: CfgNode, prefix: str = "") -> dict:
    items = {}
    for name, value in cfg.items():
        inner = isinstance(value, CfgNode)
        items |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return items


def test_adding_keys_changes_none_of_detectron2s():
    cfg = get_cfg()
    before = flat(cfg)
    add_panoptic_fpn_config(cfg)
    assert {key: value for key, value in flat(cfg).items() if key in before} == before
    assert len(flat(cfg)) > len(before)


def test_adding_keys_again_or_late_resets_nothing():
    cfg = config("MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.ACCELERATION.WINOGRAD", False)
    before = copy.deepcopy(cfg)
    add_panoptic_fpn_config(cfg)
    assert cfg == before


@pytest.mark.parametrize("name", ["GeneralizedRCNN", "PanopticFPN", "SemanticSegmentor"])
def test_adding_keys_changes_no_model_of_detectron2(detectron2_cfg, name):
    detectron2_cfg.MODEL.META_ARCHITECTURE = name
    shapes = []
    for add in (lambda cfg: None, add_panoptic_fpn_config):
        add(detectron2_cfg)
        state = build_model(detectron2_cfg).state_dict()
        shapes.append({key: value.shape for key, value in state.items()})
    assert shapes[0] == shapes[1]


# What follows the datasets.


def test_counts_come_from_the_dataset(tiny):
    name, _ = tiny
    cfg = resolve_config(config("DATASETS.TRAIN", f"('{name}',)"))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (2, 2)
    assert resolve_config(cfg) is cfg


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("ROI_HEADS", 81, "2 thing"), ("SEM_SEG_HEAD", 1, "2 semantic"), ("SEM_SEG_HEAD", 53, "2 s")],
)
def test_a_count_that_is_set_wrong_is_one_line(tiny, split, key, value, kind):
    name, _ = tiny
    cfg = config(f"DATASETS.{split}", f"('{name}',)", f"MODEL.{key}.NUM_CLASSES", value)
    message = rf"MODEL\.{key}\.NUM_CLASSES is {value}, but dataset tiny has {kind}"
    with pytest.raises(UserError, match=message) as error:
        resolve_config(cfg)
    assert "\n" not in str(error.value)


def test_a_config_of_detectron2_alone_follows_the_dataset_too(tiny):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("tiny",)
    assert resolve_config(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    with pytest.raises(UserError, match=r"ROI_HEADS\.NUM_CLASSES is 3, but dataset tiny has 2"):
        resolve_config(cfg)


def test_predicting_needs_no_dataset(tiny):
    name, data = tiny
    data.panoptic_json.unlink()
    cfg = config(
        *("DATASETS.TRAIN", f"('{name}',)", "MODEL.META_ARCHITECTURE", "PanopticFPNExt"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9),
        *("MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS", [0]),
    )
    assert resolve_config(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_evaluating_needs_no_training_data(shapes, tmp_path):
    with TinyDataset(tmp_path / "data", 1).registered() as name:
        (tmp_path / "data" / "panoptic.json").unlink()
        cfg = config("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "('shapes_val',)")
        assert resolve_config(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 5


CATEGORIES = [
    {"id": 1, "name": "sky", "isthing": 0},
    {"id": 2, "name": "ground", "isthing": 0},
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 4, "name": "dog", "isthing": 1},
]


def renamed(changes):
    return [{**c, **changes.get(c["id"], {})} for c in CATEGORIES]


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
@pytest.mark.parametrize(
    ("categories", "label_space", "message"),
    [
        (
            renamed({3: {"name": "dog"}, 4: {"name": "cat"}}),
            "separated",
            "first and second have different thing classes: number 0 is 'cat' in one and 'dog'",
        ),
        (
            renamed({2: {"name": "grass"}}),
            "separated",
            "different semantic classes: number 2 is 'ground' in one and 'grass' in the other",
        ),
        (
            CATEGORIES[:3],
            "separated",
            "number 1 is 'dog' in one and missing in the other; list all",
        ),
        (CATEGORIES, "full", "different semantic classes: number 0 is 'things' in one and 'sky'"),
        (CATEGORIES, "separated", None),
        (renamed({3: {"id": 13}, 4: {"id": 40}}), "separated", None),
    ],
)
def test_datasets_of_a_run_have_the_same_classes(key, categories, label_space, message):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    entries = {"first": (CATEGORIES, "separated"), "second": (categories, label_space)}
    for name, (its_categories, its_label_space) in entries.items():
        register_panoptic_dataset(
            *(name, "images", "pngs", "panoptic.json"),
            label_space=its_label_space,
            categories=its_categories,
        )
    try:
        names = {"DATASETS.TRAIN": ("first",), key: ("first", "second")}
        cfg = config(*(item for pair in names.items() for item in pair))
        if message is None:
            resolve_config(cfg)
        else:
            with pytest.raises(UserError, match=message) as error:
                resolve_config(cfg)
            assert "\n" not in str(error.value)
    finally:
        for name in entries:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("label_space", ["separated", "full"])
@pytest.mark.parametrize("registered", [True, False])
def test_categories_travel_in_the_config(tmp_path, label_space, registered):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    def register(**arguments):
        files = tmp_path / "images", tmp_path / "pngs", tmp_path / "panoptic.json"
        register_panoptic_dataset("first", *files, label_space=label_space, **arguments)

    def forget():
        MetadataCatalog.remove("first")
        if "first" in DatasetCatalog.list():
            DatasetCatalog.remove("first")

    options = "DATASETS.TRAIN", "()", "DATASETS.TEST", "('first',)"
    other = ["1 stuff #000000 sky", "2 stuff #000000 grass"]
    try:
        register(categories=CATEGORIES)
        resolved = resolve_config(config(*options))
        expected = MetadataCatalog.get("first").as_dict()
        for keys, message in (
            (
                ("MODEL.CATEGORIES", other, "MODEL.LABEL_SPACE", label_space),
                "number 1 is .* 'grass'",
            ),
            (("MODEL.CATEGORIES", resolved.MODEL.CATEGORIES), "label spaces are  and"),
        ):
            with pytest.raises(UserError, match=f"CATEGORIES are not those of .* first: {message}"):
                resolve_config(config(*options, *keys))
        forget()

        if registered:
            register()  # its JSON is not there
        again = get_cfg()
        add_panoptic_fpn_config(again)
        (tmp_path / "config.yaml").write_text(resolved.dump())
        again.merge_from_file(str(tmp_path / "config.yaml"))
        assert flat(resolve_config(again)).keys() == flat(resolved).keys()
        for key in ("MODEL.CATEGORIES", "MODEL.LABEL_SPACE", "MODEL.ROI_HEADS.NUM_CLASSES"):
            assert flat(resolve_config(again))[key] == flat(resolved)[key]
        found = MetadataCatalog.get("first").as_dict()
        for key in ("thing_classes", "stuff_classes", "thing_sem_seg_ids", "stuff_colors"):
            assert found[key] == expected[key]
        for kind in ("thing", "stuff"):
            key = f"{kind}_dataset_id_to_contiguous_id"
            assert found[key] == expected[key]
    finally:
        forget()


def test_label_spaces_of_a_run_are_the_same():
    """With equal names: what counts is which semantic classes are things."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, ids in (("first", (0, 0)), ("second", (1, 1))):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(
            thing_classes=["cat", "dog"], stuff_classes=["a", "b"], thing_sem_seg_ids=ids
        )
    try:
        with pytest.raises(UserError, match=r"first and second have different label spaces.*\[0, "):
            resolve_config(config("DATASETS.TRAIN", "('first', 'second')"))
    finally:
        for name in ("first", "second"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


# Every key of the extension, on every architecture: it works, or it is refused.

OURS = ("PanopticFPNExt", "SemanticFPN", "TwoNetworkPanopticFPN")
REFUSED, WORKS = "refused", "works"
EVERYWHERE = dict.fromkeys(OURS, WORKS)


def on(*names: str) -> dict[str, str]:
    return {name: WORKS if name in names else REFUSED for name in OURS}


def backbone(name: str, *more) -> list:
    return ["MODEL.BACKBONE.NAME", f"build_resnet_{name}_backbone", *more]


def settings_of_stand_ins(model, cfg):
    return [
        {k: v for k, v in vars(module).items() if isinstance(v, bool) and k != "training"}
        for module in model.modules()
    ]


def fixed_part(model, cfg):
    acceleration = Acceleration.from_config(cfg)
    return acceleration.cuda_graphs, acceleration.compiled


def precision(model, cfg):
    with torch.no_grad(), EventStorage():
        (output,) = model.eval()([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
    return {k: v.dtype for k, v in output.items() if k == "sem_seg"}


def shapes_of_parameters(model, cfg):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def augmentations(model, cfg):
    return str(PanopticFPNMapper(cfg, is_train=True).augmentations)


def optimizer(model, cfg):
    return str(Trainer.build_optimizer(cfg, model))


def evaluators(model, cfg):
    return evaluator_builders(cfg, "shapes_val"), cfg.TEST.SUBMISSION


def geometry(model, cfg):
    return [
        (module.stride, module.dilation)
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]


def norms(model, cfg):
    return [type(module) for module in model.modules()]


def merging(model, cfg):
    return model.postprocess.merging


# key: its value; what else is set, with and without it; what it changes; where it works.
KEYS = {
    "MODEL.ACCELERATION.WINOGRAD": (False, [], settings_of_stand_ins, EVERYWHERE),
    "MODEL.ACCELERATION.FOLD_BN": (False, [], settings_of_stand_ins, EVERYWHERE),
    "MODEL.ACCELERATION.CHANNELS_LAST": (False, [], settings_of_stand_ins, EVERYWHERE),
    "MODEL.ACCELERATION.PRECISION": ("bfloat16", [], precision, EVERYWHERE),
    "MODEL.ACCELERATION.COMPILE": (True, [], fixed_part, EVERYWHERE),
    "MODEL.SEM_SEG_HEAD.AGGREGATION": ("concat", [], shapes_of_parameters, EVERYWHERE),
    "MODEL.FPN.GROUPS": (2, backbone("grouped_fpn"), shapes_of_parameters, EVERYWHERE),
    "MODEL.RESNETS.OUTPUT_STRIDE": (
        16,
        backbone(
            "dilated",
            *("MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]),
            *("MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]], "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16),
        ),
        geometry,
        EVERYWHERE,
    ),
    "MODEL.SYMMETRIC_DECODER.NORM": (
        "BN",
        backbone(
            "symmetric",
            *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2"], "MODEL.RPN.IN_FEATURES", ["p2"]),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
        ),
        norms,
        EVERYWHERE,
    ),
    "MODEL.PANOPTIC_FPN.TRAINING": (
        "alternate",
        [],
        lambda model, cfg: model.training_schedule,
        on("PanopticFPNExt"),
    ),
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": (
        0.5,
        [],
        lambda model, cfg: model.instance_loss_weight,
        on("PanopticFPNExt"),
    ),
    "MODEL.PANOPTIC_FPN.OUTPUTS": (
        ["panoptic_seg"],
        [],
        lambda model, cfg: model.postprocess.outputs,
        on("PanopticFPNExt", "TwoNetworkPanopticFPN"),
    ),
    "MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS": (
        [1, 2],
        [],
        merging,
        on("PanopticFPNExt", "TwoNetworkPanopticFPN"),
    ),
    "MODEL.PANOPTIC_FPN.COMBINE.NMS_THRESH": (
        0.5,
        [],
        merging,
        on("PanopticFPNExt", "TwoNetworkPanopticFPN"),
    ),
    "MODEL.PANOPTIC_FPN.COMBINE.ENABLED": (False, [], None, on()),
    "MODEL.TWO_NETWORK.INSTANCE_WEIGHTS": ("", [], None, {}),  # tests/modeling/meta_arch
    "MODEL.TWO_NETWORK.SEMANTIC_WEIGHTS": ("", [], None, {}),
    "MODEL.LOAD_PROPOSALS": (True, [], None, on()),
    "DATASETS.PANOPTIC": ([], [], None, {}),  # tests/data/test_registration.py
    "INPUT.COLOR_AUG_SSD": (True, [], augmentations, EVERYWHERE),
    "INPUT.CROP.AFTER_RESIZE": (
        True,
        ["INPUT.CROP.ENABLED", True],
        augmentations,
        EVERYWHERE,
    ),
    "INPUT.CROP.HOLD_INSTANCE": (
        0.5,
        ["INPUT.CROP.ENABLED", True],
        augmentations,
        EVERYWHERE,
    ),
    "TEST.EVALUATORS": (
        "detectron2",
        ["MODEL.PANOPTIC_FPN.OUTPUTS", ["sem_seg"]],
        evaluators,
        EVERYWHERE,
    ),
    "TEST.SUBMISSION": (
        True,
        [],
        evaluators,
        on("PanopticFPNExt", "TwoNetworkPanopticFPN"),
    ),
    "TEST.AUG.ENABLED": (True, [], None, on()),
    "TEST.KEYPOINT_OKS_SIGMAS": ([0.1], [], None, on()),
    "SOLVER.OPTIMIZER": ("ADAMW", [], optimizer, EVERYWHERE),
    "SOLVER.MOMENTUM": (0.5, [], optimizer, EVERYWHERE),
    "SOLVER.NESTEROV": (True, [], optimizer, EVERYWHERE),
    "MODEL.RPN.NMS_THRESH": (
        0.5,
        [],
        lambda model, cfg: cfg.MODEL.RPN.NMS_THRESH,
        EVERYWHERE,
    ),
}


def test_every_key_of_the_extension_is_in_the_table():
    theirs = flat(get_cfg())
    elsewhere = {"MODEL.CATEGORIES", "MODEL.LABEL_SPACE"}  # above
    elsewhere |= {"MODEL.ACCELERATION.CUDA_GRAPHS"}  # tests/modeling/test_fixed_part.py
    # tests/evaluation/test_build.py and test_report.py
    elsewhere |= {"TEST.INTERVALS", "TEST.BOUNDARY_PQ", "TEST.REPORT"}
    elsewhere |= {"DETERMINISTIC"}  # tests/engine/test_run_folder.py
    # tests/engine/test_checkpoint_hooks.py and test_validation_loss.py
    elsewhere |= {"SOLVER.CHECKPOINT_KEEP", "TEST.BEST_METRIC", "TEST.PATIENCE", "TEST.LOSS"}
    # tests/engine/test_pictures.py and test_tracking.py
    elsewhere |= {"TEST.PICTURES", *(f"TRACKING.{key}" for key in ("WRITER", "PROJECT", "NAME"))}
    assert {key for key in flat(config()) if key not in theirs} <= KEYS.keys() | elsewhere
    assert {"float32", "bfloat16"} <= PRECISIONS.keys()


@pytest.mark.parametrize("architecture", OURS)
@pytest.mark.parametrize("key", [key for key, (*_, where) in KEYS.items() if where])
def test_a_key_works_or_is_refused(shapes, ext_cfg, key, architecture):
    value, others, effect, where = KEYS[key]
    add_panoptic_fpn_config(ext_cfg)
    ext_cfg.MODEL.META_ARCHITECTURE = architecture
    ext_cfg.DATASETS.TRAIN, ext_cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val",)
    ext_cfg.MODEL.ROI_HEADS.NUM_CLASSES, ext_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5, 6
    if "OUTPUTS" in "".join(map(str, others)) and architecture == "SemanticFPN":
        others = []
    ext_cfg.merge_from_list(others)
    changed = copy.deepcopy(ext_cfg)
    changed.merge_from_list([key, value])
    if where[architecture] == REFUSED:
        with pytest.raises(UserError, match=key.replace(".", r"\.")) as error:
            resolved = resolve_config(changed)
            build_model(resolved)
            evaluator_builders(resolved, "shapes_val")
        assert "\n" not in str(error.value)
        return
    found = []
    for cfg in (ext_cfg, changed):
        cfg = resolve_config(cfg)
        found.append(effect(build_model(cfg), cfg))
    assert found[0] != found[1]


HEAD_OF_DETECTRON2 = ("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead")
MASK_RCNN = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["MODEL.FPN.GROUPS", 2],
            "GROUPS 2 has no effect without MODEL.BACKBONE.NAME build_resn",
        ),
        (["MODEL.RESNETS.OUTPUT_STRIDE", 8], "OUTPUT_STRIDE 8 has no effect without"),
        (["MODEL.SYMMETRIC_DECODER.NORM", "BN"], "NORM BN has no effect without"),
        (["INPUT.CROP.AFTER_RESIZE", True], "without INPUT.CROP.ENABLED True: leave it out"),
        (
            [
                "MODEL.SEM_SEG_HEAD.NAME",
                "SemSegFPNHead",
                "MODEL.SEM_SEG_HEAD.AGGREGATION",
                "concat",
            ],
            "AGGREGATION concat has no effect without MODEL.SEM_SEG_HEAD.NAME SemanticFPNHead",
        ),
        (
            ["TEST.BEST_METRIC", "panoptic_seg/PQ"],
            "TEST.BEST_METRIC panoptic_seg/PQ has no effect without TEST.EVAL_PERIOD: leave it out",
        ),
        (["TRACKING.PROJECT", "x"], "TRACKING.PROJECT x has no effect without TRACKING.WRITER"),
        (["TRACKING.NAME", "x"], "TRACKING.NAME x has no effect without TRACKING.WRITER"),
        (["TEST.PATIENCE", 3], "TEST.PATIENCE 3 has no effect without TEST.BEST_METRIC"),
        (["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.NESTEROV", True], "NESTEROV True has no effect"),
        (
            [*MASK_RCNN, "MODEL.ACCELERATION.WINOGRAD", False],
            "WINOGRAD False has no effect without MODEL.META_ARCHITECTURE PanopticFPNExt or",
        ),
        (
            [
                "MODEL.META_ARCHITECTURE",
                "GeneralizedRCNN",
                "MODEL.PANOPTIC_FPN.OUTPUTS",
                ["sem_seg"],
            ],
            "GeneralizedRCNN does not return sem_seg, set it to ['instances']",
        ),
    ],
)
def test_a_key_without_effect_is_refused(ext_cfg, options, message):
    add_panoptic_fpn_config(ext_cfg)
    ext_cfg.merge_from_list(options)
    with pytest.raises(UserError) as error:
        resolve_config(ext_cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "outputs"), [("SemanticFPN", ["sem_seg"]), ("GeneralizedRCNN", ["instances"])]
)
def test_a_network_of_one_task_has_the_output_it_has(ext_cfg, architecture, outputs):
    ext_cfg.MODEL.META_ARCHITECTURE = architecture
    cfg = resolve_config(ext_cfg)
    assert outputs == cfg.MODEL.PANOPTIC_FPN.OUTPUTS
    assert resolve_config(cfg) is cfg
