"""Every config key of the extension; what a config leaves to its dataset; what would do nothing."""

import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.layers import get_norm

from .data.category_lines import categories_of, first_difference, label_space_of, lines_of
from .data.label_space import thing_sem_seg_ids
from .data.registration import register_datasets_of_config, set_categories
from .errors import UserError

logger = logging.getLogger(__name__)

OUTPUTS = ("sem_seg", "instances", "panoptic_seg")
FROM_DATASET = -1
"""In ``MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS``: what the dataset says."""

MERGING_ARCHITECTURES = ("PanopticFPNExt", "TwoNetworkPanopticFPN")
ARCHITECTURES = (*MERGING_ARCHITECTURES, "SemanticFPN")
_DETECTRON2_DEFAULTS = get_cfg()


def add_panoptic_fpn_config(cfg: CfgNode) -> None:
    """Add the keys of panoptic_fpn_ext, with their defaults, to a Detectron2 config, in place.

    No key of Detectron2's is changed. Every other key that the models use keeps its meaning, with
    three things to know:

    - ``MODEL.ROI_HEADS.NUM_CLASSES`` and ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` follow the datasets
      where they have Detectron2's default; see :func:`resolve_config`.
    - ``MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT`` (λi) weighs all losses of the ROI heads. At 0 the
      instance task is left out of training, the RPN included, as at ``MODEL.SEM_SEG_HEAD.
      LOSS_WEIGHT`` (λs) 0 the semantic task is.
    - ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` is True in Detectron2, also for panoptic datasets with
      an instances JSON; the configs of this project set it to False, since an image without things
      still has stuff to learn from.
    """
    if "ACCELERATION" in cfg.MODEL:
        return  # they are there, and may be set
    # Speed, with the same results up to rounding (docs/ACCELERATION.md).
    cfg.MODEL.ACCELERATION = CfgNode()
    # On CPUs in inference, convolutions with fewer multiplications, where that is faster.
    cfg.MODEL.ACCELERATION.WINOGRAD = True
    # Batch normalization, in training only where frozen, as part of the convolution before it.
    cfg.MODEL.ACCELERATION.FOLD_BN = True
    # The channels of a pixel side by side in memory, where that is faster: on GPUs, and on CPUs in
    # inference.
    cfg.MODEL.ACCELERATION.CHANNELS_LAST = True
    # "float16" or "bfloat16" for mixed precision in inference; "auto" for bfloat16 on CPUs that are
    # faster in it, float32 elsewhere. For training, SOLVER.AMP.
    cfg.MODEL.ACCELERATION.PRECISION = "float32"
    # In inference on GPUs, backbone, semantic branch and RPN head as CUDA graphs, of the sizes of
    # images that come again; and by torch.compile. Both are off by default.
    cfg.MODEL.ACCELERATION.CUDA_GRAPHS = False
    cfg.MODEL.ACCELERATION.COMPILE = False

    # How the semantic branch brings the levels of the pyramid together: "sum" or "concat".
    cfg.MODEL.SEM_SEG_HEAD.AGGREGATION = "sum"

    # Groups of the pyramid's channels, with the backbone build_resnet_grouped_fpn_backbone: with 2
    # the instance branch reads the first half, the semantic branch the second.
    cfg.MODEL.FPN.GROUPS = 1

    # Backbone build_resnet_dilated_backbone: the stride no stage goes beyond, 8, 16 or 32 (an
    # ordinary ResNet); later stages are dilated.
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 32
    # Backbone build_resnet_symmetric_backbone: normalization in the decoder, which has no
    # pretrained statistics; the encoder has MODEL.RESNETS.NORM.
    cfg.MODEL.SYMMETRIC_DECODER = CfgNode()
    cfg.MODEL.SYMMETRIC_DECODER.NORM = "GN"

    # "joint": both tasks in every iteration. "alternate": the instance task in even iterations,
    # the semantic task in odd ones; each counts as an iteration of SOLVER.MAX_ITER.
    cfg.MODEL.PANOPTIC_FPN.TRAINING = "joint"
    # What inference returns for an image; what is left out is not computed.
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = list(OUTPUTS)
    # Semantic classes that never become stuff segments: [0] where class 0 is "things" (COCO), the
    # thing classes where all categories have a semantic class (Cityscapes), [-1] as the dataset
    # says.
    cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS = [FROM_DATASET]

    # The categories and the label space of the datasets the model is trained on, filled in from
    # these: names and colours travel with config.yaml, where the annotations are not. Set both to
    # nothing to train on other classes from such a config.
    cfg.MODEL.CATEGORIES = []
    cfg.MODEL.LABEL_SPACE = ""

    # Before merging, instances whose box overlaps one of a higher score, of whatever class, by more
    # than this IoU are dropped; 1.0 drops none.
    cfg.MODEL.PANOPTIC_FPN.COMBINE.NMS_THRESH = 1.0

    # Weights of the two networks of TwoNetworkPanopticFPN, each as MODEL.WEIGHTS; set both, or
    # neither where MODEL.WEIGHTS has both.
    cfg.MODEL.TWO_NETWORK = CfgNode()
    cfg.MODEL.TWO_NETWORK.INSTANCE_WEIGHTS = ""
    cfg.MODEL.TWO_NETWORK.SEMANTIC_WEIGHTS = ""

    # Datasets of your own, registered before training and evaluation: a list of dicts with the
    # arguments of register_panoptic_dataset (docs/DATASETS.md).
    cfg.DATASETS.PANOPTIC = []

    # Colour augmentation of SSD in training: brightness, contrast, saturation, hue.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Crop the resized image (crops of one size after scale jitter, as the paper on Cityscapes),
    # not the original one (Detectron2's order).
    cfg.INPUT.CROP.AFTER_RESIZE = False
    # Probability that a crop is drawn so that it holds an instance; 0 draws all crops blindly.
    cfg.INPUT.CROP.HOLD_INSTANCE = 0.0

    # Whose evaluators: "panoptic_fpn_ext", or "detectron2" for Detectron2's own.
    cfg.TEST.EVALUATORS = "panoptic_fpn_ext"
    # Write OUTPUT_DIR/inference/<dataset>_submission.zip, which the panoptic test servers of COCO
    # and Cityscapes take, whenever a dataset is evaluated.
    cfg.TEST.SUBMISSION = False
    # Write OUTPUT_DIR/inference/report.html, and what tools/compare.py reads, whenever a dataset is
    # evaluated (docs/ANALYSIS.md).
    cfg.TEST.REPORT = True
    # At each evaluation of a training so many images of a dataset, the first ones, as they are,
    # predicted and true, go to TensorBoard and TRACKING.WRITER.
    cfg.TEST.PICTURES = 4
    # 95 % intervals of PQ, mIoU and AP among the scores, as <metric>_low and <metric>_high.
    cfg.TEST.INTERVALS = False
    # Boundary PQ among the scores, as boundary_PQ, boundary_PQ_th and boundary_PQ_st.
    cfg.TEST.BOUNDARY_PQ = False

    # Keep model_best.pth, of the best score of this name among the evaluations of TEST.EVAL_PERIOD:
    # "panoptic_seg/PQ", say; with several datasets "<dataset>/panoptic_seg/PQ"; or, smaller being
    # better, "validation/total_loss".
    cfg.TEST.BEST_METRIC = ""
    # Stop after so many evaluations without a better one; 0 never.
    cfg.TEST.PATIENCE = 0
    # Beside the scores of a dataset, the losses on it: "validation/total_loss" and its terms.
    cfg.TEST.LOSS = False

    # Where curves go beside TensorBoard: "wandb" or "mlflow", whose package has to be installed
    # (docs/ANALYSIS.md).
    cfg.TRACKING = CfgNode()
    cfg.TRACKING.WRITER = ""
    # The project of Weights & Biases, the experiment of MLflow; the name of the run, by default
    # that of OUTPUT_DIR's folder.
    cfg.TRACKING.PROJECT = "panoptic_fpn_ext"
    cfg.TRACKING.NAME = ""

    # Only ways of computing that give the same bits each time, on CPUs; on GPUs where PyTorch has
    # them. With SEED a run can be repeated then.
    cfg.DETERMINISTIC = False

    # How many of the checkpoints of SOLVER.CHECKPOINT_PERIOD are kept, the newest; 0 for all. The
    # final one and the best one are kept besides.
    cfg.SOLVER.CHECKPOINT_KEEP = 0

    # "SGD" (Detectron2's own) or "ADAMW"; both read the other SOLVER keys.
    cfg.SOLVER.OPTIMIZER = "SGD"


def resolve_config(cfg: CfgNode) -> CfgNode:
    """Fill in what a config leaves to its datasets, and refuse what does not fit or has no effect.

    A class count that has Detectron2's default follows the datasets of ``DATASETS.TRAIN`` and
    ``DATASETS.TEST``, as far as they are registered and on this machine; so do
    ``THING_SEM_SEG_IDS``. The datasets of ``DATASETS.PANOPTIC`` are registered first: all that a
    config names works from it alone.

    Returns:
        ``cfg`` itself if it leaves nothing open (a config of Detectron2 alone, without
        :func:`add_panoptic_fpn_config`, gets the extension's keys first), else a resolved copy.

    Raises:
        UserError: datasets whose classes differ; a class count that is set and another than the
            dataset's; a key that would have no effect.
    """
    if "ACCELERATION" not in cfg.MODEL:
        cfg = _thawed(cfg)
        add_panoptic_fpn_config(cfg)
    register_datasets_of_config(cfg)
    _refuse_idle_keys(cfg)
    _check_normalization(cfg)

    datasets = _datasets_with_classes(cfg)
    for metadata in datasets[1:]:
        _check_same_classes(datasets[0], metadata)
    resolved: dict[str, Any] = _categories(cfg, datasets)
    for key, attribute, kind in (
        ("MODEL.ROI_HEADS.NUM_CLASSES", "thing_classes", "thing"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff_classes", "semantic"),
    ):
        classes = datasets[0].get(attribute, None) if datasets else None
        value = _value(cfg, key)
        if classes is None or value == len(classes):
            continue
        if value != _value(_DETECTRON2_DEFAULTS, key):
            raise UserError(
                f"{key} is {value}, but dataset {datasets[0].name} has {len(classes)} {kind} "
                "classes: leave the key out, and it is taken from the dataset"
            )
        resolved[key] = len(classes)
    merges = cfg.MODEL.META_ARCHITECTURE in MERGING_ARCHITECTURES
    if merges and FROM_DATASET in cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS:
        # Without a dataset as in Detectron2: class 0 is "things".
        ids = thing_sem_seg_ids(datasets[0]).values() if datasets else (0,)
        resolved["MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS"] = sorted(set(ids))
    num_things = resolved.get("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    outputs, possible = list(cfg.MODEL.PANOPTIC_FPN.OUTPUTS), _possible_outputs(cfg, num_things)
    if outputs == list(OUTPUTS):
        resolved["MODEL.PANOPTIC_FPN.OUTPUTS"] = possible
    elif impossible := [output for output in outputs if output not in possible]:
        raise UserError(
            f"MODEL.PANOPTIC_FPN.OUTPUTS {outputs}: {cfg.MODEL.META_ARCHITECTURE}"
            f"{'' if num_things else ' without thing classes'} does not return {impossible[0]}, "
            f"set it to {possible}"
        )
    if resolved:
        cfg = _thawed(cfg)
        cfg.merge_from_list([item for pair in resolved.items() for item in pair])
        cfg.freeze()
    return cfg


def _possible_outputs(cfg: CfgNode, num_things: int) -> list[str]:
    """The outputs that the architecture can return, with so many thing classes.

    Raises:
        UserError: it needs thing classes, and there are none.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "SemanticFPN":
        return ["sem_seg"]
    if num_things:
        return ["instances"] if architecture == "GeneralizedRCNN" else list(OUTPUTS)
    if architecture in ("GeneralizedRCNN", "TwoNetworkPanopticFPN", "PanopticFPN"):
        raise UserError(
            f"MODEL.META_ARCHITECTURE {architecture}: there are no thing classes to find instances "
            "of; choose PanopticFPNExt, or SemanticFPN for the semantic output alone"
        )
    return [output for output in OUTPUTS if output != "instances"]


def _datasets_with_classes(cfg: CfgNode) -> list[Metadata]:
    """Metadata of the registered datasets of a config, training first.

    A dataset whose annotations are not on this machine has the classes of ``MODEL.CATEGORIES``, or
    is left out: evaluating needs no training data, and predicting none at all.
    """
    datasets = []
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        metadata = MetadataCatalog.get(name)
        try:
            known = metadata.get("stuff_classes") is not None or name in DatasetCatalog.list()
        except UserError as error:
            logger.debug("The classes of %s are not known: %s", name, error)
            known = False
        if not known and cfg.MODEL.CATEGORIES:
            categories = categories_of(cfg.MODEL.CATEGORIES)
            set_categories(name, categories, cfg.MODEL.LABEL_SPACE, source="MODEL.CATEGORIES")
            known = True
        if known:
            datasets.append(metadata)
    return datasets


def _categories(cfg: CfgNode, datasets: list[Metadata]) -> dict[str, Any]:
    """``MODEL.CATEGORIES`` and ``MODEL.LABEL_SPACE`` where the datasets tell them.

    Raises:
        UserError: the config has them, and they are others.
    """
    if not datasets or "thing_sem_seg_ids" not in datasets[0].as_dict():
        return {}
    lines, space = lines_of(datasets[0]), label_space_of(datasets[0])
    ours, difference = cfg.MODEL.CATEGORIES, None
    if ours:
        difference = first_difference(ours, lines)
        if space != cfg.MODEL.LABEL_SPACE:
            difference = f"label spaces are {cfg.MODEL.LABEL_SPACE} and {space}"
    if difference:
        raise UserError(
            f"MODEL.CATEGORIES are not those of dataset {datasets[0].name}: {difference}; to train "
            "on it, set MODEL.CATEGORIES [] MODEL.LABEL_SPACE ''"
        )
    return {} if ours else {"MODEL.CATEGORIES": lines, "MODEL.LABEL_SPACE": space}


def _check_same_classes(first: Metadata, other: Metadata) -> None:
    """Raise UserError unless the classes of two datasets agree, in names, order and kind."""
    pair = f"datasets {first.name} and {other.name}"
    for attribute, kind in (("thing_classes", "thing"), ("stuff_classes", "semantic")):
        ours, theirs = (metadata.get(attribute, None) for metadata in (first, other))
        if ours is None or theirs is None or list(ours) == list(theirs):
            continue
        number = next(
            (k for k, names in enumerate(zip(ours, theirs)) if names[0] != names[1]),  # noqa: B905
            min(len(ours), len(theirs)),
        )
        names = [repr(c[number]) if number < len(c) else "missing" for c in (ours, theirs)]
        advice = "datasets of a run need the same classes in the same order"
        if set(ours) < set(theirs) or set(theirs) < set(ours):
            advice = "list all categories in both, also those that have no segment there"
        raise UserError(
            f"{pair} have different {kind} classes: number {number} is {names[0]} in one and "
            f"{names[1]} in the other; {advice}"
        )
    if thing_sem_seg_ids(first) != thing_sem_seg_ids(other):
        raise UserError(
            f"{pair} have different label spaces: the semantic classes of their things are "
            f"{[*thing_sem_seg_ids(first).values()]} and {[*thing_sem_seg_ids(other).values()]} "
            "(thing_sem_seg_ids); register both with the same label_space"
        )


def _with_architecture(*names: str) -> tuple[Callable[[CfgNode], bool], str]:
    return (
        lambda cfg: cfg.MODEL.META_ARCHITECTURE in names,
        f"MODEL.META_ARCHITECTURE {' or '.join(names)}",
    )


def _with_backbone(name: str) -> tuple[Callable[[CfgNode], bool], str]:
    return lambda cfg: name == cfg.MODEL.BACKBONE.NAME, f"MODEL.BACKBONE.NAME {name}"


_OUR_EVALUATORS = (
    lambda cfg: cfg.TEST.EVALUATORS == "panoptic_fpn_ext",
    "TEST.EVALUATORS panoptic_fpn_ext",
)
_CROPS = (lambda cfg: cfg.INPUT.CROP.ENABLED, "INPUT.CROP.ENABLED True")
_TRACKED = (lambda cfg: bool(cfg.TRACKING.WRITER), "TRACKING.WRITER")
_SGD = (lambda cfg: cfg.SOLVER.OPTIMIZER == "SGD", "SOLVER.OPTIMIZER SGD")

# Keys, the extension's own and some of Detectron2's, that have an effect under a condition alone;
# and in words what the condition is.
_CONDITIONS: dict[str, tuple[Callable[[CfgNode], bool], str]] = {
    "MODEL.ACCELERATION.WINOGRAD": _with_architecture(*ARCHITECTURES),
    "MODEL.ACCELERATION.FOLD_BN": _with_architecture(*ARCHITECTURES),
    "MODEL.ACCELERATION.CHANNELS_LAST": _with_architecture(*ARCHITECTURES),
    "MODEL.ACCELERATION.PRECISION": _with_architecture(*ARCHITECTURES),
    "MODEL.ACCELERATION.CUDA_GRAPHS": (
        lambda cfg: (
            cfg.MODEL.META_ARCHITECTURE in ARCHITECTURES and cfg.MODEL.DEVICE.startswith("cuda")
        ),
        f"MODEL.META_ARCHITECTURE {' or '.join(ARCHITECTURES)} and MODEL.DEVICE cuda",
    ),
    "MODEL.ACCELERATION.COMPILE": _with_architecture(*ARCHITECTURES),
    "MODEL.SEM_SEG_HEAD.AGGREGATION": (
        lambda cfg: cfg.MODEL.SEM_SEG_HEAD.NAME == "SemanticFPNHead",
        "MODEL.SEM_SEG_HEAD.NAME SemanticFPNHead",
    ),
    "MODEL.FPN.GROUPS": _with_backbone("build_resnet_grouped_fpn_backbone"),
    "MODEL.RESNETS.OUTPUT_STRIDE": _with_backbone("build_resnet_dilated_backbone"),
    "MODEL.SYMMETRIC_DECODER.NORM": _with_backbone("build_resnet_symmetric_backbone"),
    "MODEL.PANOPTIC_FPN.TRAINING": _with_architecture("PanopticFPNExt"),
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _with_architecture("PanopticFPNExt", "PanopticFPN"),
    "MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS": _with_architecture(*MERGING_ARCHITECTURES),
    "MODEL.PANOPTIC_FPN.COMBINE.NMS_THRESH": _with_architecture(*MERGING_ARCHITECTURES),
    "MODEL.TWO_NETWORK.INSTANCE_WEIGHTS": _with_architecture("TwoNetworkPanopticFPN"),
    "MODEL.TWO_NETWORK.SEMANTIC_WEIGHTS": _with_architecture("TwoNetworkPanopticFPN"),
    "DETERMINISTIC": (lambda cfg: cfg.SEED >= 0, "SEED 0 or more"),
    "TEST.KEYPOINT_OKS_SIGMAS": (
        lambda cfg: cfg.TEST.EVALUATORS == "detectron2",
        "TEST.EVALUATORS detectron2",
    ),
    "TEST.BEST_METRIC": (lambda cfg: cfg.TEST.EVAL_PERIOD > 0, "TEST.EVAL_PERIOD"),
    "TEST.PATIENCE": (lambda cfg: bool(cfg.TEST.BEST_METRIC), "TEST.BEST_METRIC"),
    "TEST.INTERVALS": _OUR_EVALUATORS,
    "TEST.BOUNDARY_PQ": _OUR_EVALUATORS,
    "TRACKING.PROJECT": _TRACKED,
    "TRACKING.NAME": _TRACKED,
    "INPUT.CROP.AFTER_RESIZE": _CROPS,
    "INPUT.CROP.HOLD_INSTANCE": _CROPS,
    "SOLVER.MOMENTUM": _SGD,
    "SOLVER.NESTEROV": _SGD,
}

# Keys of Detectron2's that nothing here reads, and what to do instead.
_UNREAD: dict[str, str] = {
    "MODEL.PANOPTIC_FPN.COMBINE.ENABLED": "leave panoptic_seg out of MODEL.PANOPTIC_FPN.OUTPUTS",
    "MODEL.LOAD_PROPOSALS": "Panoptic FPN makes its own proposals",
    "TEST.AUG.ENABLED": "there is no test-time augmentation of panoptic outputs yet",
}


def _refuse_idle_keys(cfg: CfgNode) -> None:
    """Raise UserError for the first key that is set and would have no effect."""
    defaults = _thawed(_DETECTRON2_DEFAULTS)
    add_panoptic_fpn_config(defaults)
    for key, (holds, condition) in _CONDITIONS.items():
        value = _value(cfg, key)
        if value != _value(defaults, key) and not holds(cfg):
            raise UserError(f"{key} {value} has no effect without {condition}: leave it out")
    if cfg.MODEL.META_ARCHITECTURE in ARCHITECTURES:
        for key, advice in _UNREAD.items():
            value = _value(cfg, key)
            if value != _value(defaults, key):
                raise UserError(f"{key} {value} has no effect: {advice}")


# Keys of normalization, and of the channels that it is of.
_NORMALIZED = {
    "MODEL.RESNETS.NORM": "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "MODEL.FPN.NORM": "MODEL.FPN.OUT_CHANNELS",
    "MODEL.SEM_SEG_HEAD.NORM": "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "MODEL.ROI_BOX_HEAD.NORM": "MODEL.ROI_BOX_HEAD.CONV_DIM",
    "MODEL.ROI_MASK_HEAD.NORM": "MODEL.ROI_MASK_HEAD.CONV_DIM",
}


def _check_normalization(cfg: CfgNode) -> None:
    """Raise UserError for a normalization that is none, or not for that many channels."""
    for key, channels_key in _NORMALIZED.items():
        norm, channels = _value(cfg, key), _value(cfg, channels_key)
        try:
            get_norm(norm, channels)
        except KeyError as error:
            raise UserError(f"{key} {norm!r}: Detectron2 has BN, SyncBN, FrozenBN, GN") from error
        except ValueError as error:
            raise UserError(
                f"{key} {norm} does not go with {channels_key} {channels}: {error}"
            ) from error


def _value(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _thawed(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    return cfg
