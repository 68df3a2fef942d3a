"""Every config key of the extension, and the keys whose value comes from the dataset."""

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

    # Both class counts follow the first dataset of DATASETS.TRAIN unless set.
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = FROM_DATASET
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = FROM_DATASET

    # How the semantic branch brings the levels of the pyramid together: "sum" or "concat".
    cfg.MODEL.SEM_SEG_HEAD.AGGREGATION = "sum"

    # Groups of the pyramid's channels, with the backbone build_resnet_grouped_fpn_backbone: with 2
    # the instance branch reads the first half, the semantic branch the second.
    cfg.MODEL.FPN.GROUPS = 1

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

    # "SGD" (Detectron2's own) or "ADAMW"; both read the other SOLVER keys.
    cfg.SOLVER.OPTIMIZER = "SGD"


def resolve_dataset_keys(cfg: CfgNode) -> CfgNode:
    """Fill in the keys that are left to the dataset.

    Returns:
        ``cfg`` itself if it leaves nothing open (a config of Detectron2 alone, without
        :func:`add_panoptic_fpn_config`, gets the extension's keys first), else a resolved copy.

    Raises:
        UserError: a key is left to the dataset, but none is registered by that name.
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
    if not counts_open and FROM_DATASET not in cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS:
        return cfg

    metadata = _first_metadata(cfg)
    if metadata is None and counts_open:
        raise UserError(
            "MODEL.ROI_HEADS.NUM_CLASSES and MODEL.SEM_SEG_HEAD.NUM_CLASSES are left to the "
            f"dataset, but none of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} and DATASETS.TEST "
            f"{tuple(cfg.DATASETS.TEST)} is registered: set both, or register the dataset first"
        )
    cfg = _thawed(cfg)
    things, sem_seg = cfg.MODEL.ROI_HEADS, cfg.MODEL.SEM_SEG_HEAD
    if things.NUM_CLASSES == FROM_DATASET:
        things.NUM_CLASSES = len(metadata.get("thing_classes", ()))
    if sem_seg.NUM_CLASSES == FROM_DATASET:
        sem_seg.NUM_CLASSES = len(metadata.get("stuff_classes", ()))
    if FROM_DATASET in cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS:
        # Detectron2's own panoptic datasets are separated: class 0 is "things".
        ids = metadata.get("thing_sem_seg_ids", (0,)) if metadata else (0,)
        cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS = sorted(set(ids))
    cfg.freeze()
    return cfg


def _first_metadata(cfg: CfgNode) -> Metadata | None:
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name in DatasetCatalog.list():
            return MetadataCatalog.get(name)
    return None


def _thawed(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    return cfg
