"""Every config key of the extension, and the keys whose value comes from the dataset."""

import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .errors import UserError

OUTPUTS = ("sem_seg", "instances", "panoptic_seg")
FROM_DATASET = -1
"""Value of a class count that :func:`resolve_dataset_keys` takes from the dataset."""


def add_panoptic_fpn_config(cfg: CfgNode) -> None:
    """Add the keys of panoptic_fpn_ext, with their defaults, to a Detectron2 config, in place.

    Every other key the models use (``MODEL.SEM_SEG_HEAD.*``, ``MODEL.PANOPTIC_FPN.COMBINE.*``,
    ``MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT``, ...) is Detectron2's own and keeps its meaning.
    """
    # A machine without a GPU is no reason to stop.
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"

    # An image without things still has stuff to learn from.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False

    # Both class counts follow the first dataset of DATASETS.TRAIN unless set.
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = FROM_DATASET
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = FROM_DATASET

    # Speed, with the same results up to rounding. On CPUs, convolutions with fewer multiplications.
    cfg.MODEL.WINOGRAD = True
    # The channels of a pixel side by side in memory, where that is faster: on GPUs, and on CPUs in
    # inference without the above.
    cfg.MODEL.CHANNELS_LAST = True
    # Batch normalization, in training only where frozen, as part of the convolution before it.
    cfg.MODEL.FOLD_BN = True
    # "float16" or "bfloat16" for mixed precision in inference; for training, SOLVER.AMP.
    cfg.MODEL.INFERENCE_PRECISION = "float32"

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

    # "SGD" (Detectron2's own) or "ADAMW"; both read the other SOLVER keys.
    cfg.SOLVER.OPTIMIZER = "SGD"


def resolve_dataset_keys(cfg: CfgNode) -> CfgNode:
    """Fill in the keys that are left to the dataset, and hold those that are set against it.

    Returns:
        ``cfg`` itself if it leaves nothing open (a config of Detectron2 alone, without
        :func:`add_panoptic_fpn_config`, gets the extension's keys first), else a resolved copy.

    Raises:
        UserError: a key is left to the dataset, but none is registered by that name; or a class
            count is set and another than that of a dataset.
    """
    if "OUTPUTS" not in cfg.MODEL.PANOPTIC_FPN:
        num_classes = (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        device = cfg.MODEL.DEVICE
        cfg = _thawed(cfg)
        add_panoptic_fpn_config(cfg)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
        cfg.MODEL.DEVICE = device

    things, sem_seg = cfg.MODEL.ROI_HEADS, cfg.MODEL.SEM_SEG_HEAD
    counts_open = FROM_DATASET in (things.NUM_CLASSES, sem_seg.NUM_CLASSES)
    ids_open = FROM_DATASET in cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS
    datasets = _datasets(cfg)
    if counts_open and not datasets:
        raise UserError(
            "MODEL.ROI_HEADS.NUM_CLASSES and MODEL.SEM_SEG_HEAD.NUM_CLASSES are left to the "
            f"dataset, but none of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} and DATASETS.TEST "
            f"{tuple(cfg.DATASETS.TEST)} is registered: set both, or register the dataset first"
        )
    if counts_open or ids_open:
        metadata = next(iter(datasets.values()), Metadata())
        cfg = _thawed(cfg)
        things, sem_seg = cfg.MODEL.ROI_HEADS, cfg.MODEL.SEM_SEG_HEAD
        if things.NUM_CLASSES == FROM_DATASET:
            things.NUM_CLASSES = len(metadata.get("thing_classes", ()))
        if sem_seg.NUM_CLASSES == FROM_DATASET:
            sem_seg.NUM_CLASSES = len(metadata.get("stuff_classes", ()))
        if ids_open:
            # Detectron2's own panoptic datasets are separated: class 0 is "things".
            ids = metadata.get("thing_sem_seg_ids", (0,))
            cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS = sorted(set(ids))
        cfg.freeze()
    for name, metadata in datasets.items():
        _check_class_count(
            "MODEL.ROI_HEADS.NUM_CLASSES", things.NUM_CLASSES, name, metadata, "thing_classes"
        )
        _check_class_count(
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES", sem_seg.NUM_CLASSES, name, metadata, "stuff_classes"
        )
    return cfg


def _datasets(cfg: CfgNode) -> dict[str, Metadata]:
    """Metadata of the registered datasets of a config, by name, training first.

    A dataset whose annotations are not on this machine is left out, unless it is the only one:
    evaluating and predicting need no training data.
    """
    names = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    registered = {n: MetadataCatalog.get(n) for n in names if n in DatasetCatalog.list()}

    def has_classes(metadata: Metadata) -> bool:
        known = metadata.as_dict()
        path = known.get("panoptic_json")
        return "stuff_classes" in known or path is None or os.path.exists(path)

    present = {name: metadata for name, metadata in registered.items() if has_classes(metadata)}
    return present or registered


def _check_class_count(
    key: str, value: int, dataset_name: str, metadata: Metadata, attribute: str
) -> None:
    try:
        classes = metadata.get(attribute)
    except UserError:  # not on this machine, and not needed: the count is set
        return
    if classes is not None and len(classes) != value:
        kind = "thing" if attribute == "thing_classes" else "semantic"
        raise UserError(
            f"{key} is {value}, but dataset {dataset_name} has {len(classes)} {kind} classes: "
            f"leave the key out, and it is taken from the dataset"
        )


def _thawed(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    return cfg
