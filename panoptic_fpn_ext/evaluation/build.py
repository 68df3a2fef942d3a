"""Which evaluators a dataset gets: those its metadata names, for what the model returns."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from fvcore.common.registry import Registry

from ..config import OUTPUTS
from .panoptic_quality import PanopticQualityEvaluator
from .sem_seg_iou import SemSegIoUEvaluator

EVALUATOR_REGISTRY = Registry("EVALUATORS")
EVALUATOR_REGISTRY.__doc__ = """
Builders of evaluators, called as ``build(dataset_name, output_folder)``. Each has the name of the
model output it evaluates; a dataset's ``evaluators`` metadata lists those it can be evaluated with.
"""


@EVALUATOR_REGISTRY.register()
def panoptic_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return PanopticQualityEvaluator.from_dataset(dataset_name)


@EVALUATOR_REGISTRY.register()
def sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return SemSegIoUEvaluator.from_dataset(dataset_name)


@EVALUATOR_REGISTRY.register()
def instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return COCOEvaluator(dataset_name, output_dir=output_folder)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluators:
    """The evaluators of a dataset for the outputs of the model.

    Args:
        cfg: ``MODEL.PANOPTIC_FPN.OUTPUTS`` says what the model returns.
        dataset_name: its ``evaluators`` metadata says what can be evaluated on it.
        output_folder: where evaluators write what they keep.
    """
    on_dataset = MetadataCatalog.get(dataset_name).get("evaluators", OUTPUTS)
    names = [name for name in OUTPUTS if name in cfg.MODEL.PANOPTIC_FPN.OUTPUTS]
    return DatasetEvaluators(
        [
            EVALUATOR_REGISTRY.get(name)(dataset_name, output_folder)
            for name in names
            if name in on_dataset
        ]
    )
