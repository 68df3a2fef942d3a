"""The trainer: its optimizers, its data, what it saves."""

import json
import math
import os
import random
import signal
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.visualizer import Visualizer
from torch import nn

from panoptic_fpn_ext import PanopticFPNMapper, UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.config import resolve_config
from panoptic_fpn_ext.data.checks import check_panoptic_dataset
from panoptic_fpn_ext.engine import Interrupted, Trainer, trainer
from panoptic_fpn_ext.evaluation import EVALUATOR_REGISTRY, needs

from ..conftest import CPU, on_cpu
from ..data.tiny_dataset import TinyDataset

CAR_CATEGORY, PERSON_CATEGORY = 7, 9  # of the tiny dataset
LR, MOMENTUM, MAX_NORM, NORM_TYPE = 0.1, 0.8, 0.5, 3.0
# Learning rate and weight decay of the parameters of `small_model`, as the config below has them.
HYPERPARAMETERS = {
    "0.weight": (LR, 0.1),
    "0.bias": (2 * LR, 0.2),
    "1.weight": (LR, 0.3),
    "1.bias": (2 * LR, 0.2),
}
AMP_SCALE = 2.0**16


def config(**solver):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM = LR, MOMENTUM
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.1, 0.2
    cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.BIAS_LR_FACTOR = 0.3, 2.0
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = MAX_NORM
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = NORM_TYPE
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def small_model(device: torch.device = CPU) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    return model.to(device)


def gradients(passes: int) -> list[list[dict[str, torch.Tensor]]]:
    """Of each of 4 steps, of each backward pass before it, by parameter; some are clipped."""
    shapes = {n: p.shape for n, p in small_model().named_parameters() if n in HYPERPARAMETERS}
    generator = torch.Generator().manual_seed(1)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}

    return [[draw(scale) for _ in range(passes)] for scale in (0.05, 1.0, 3.0, 0.4)]


def clipped(grads: dict[str, torch.Tensor], clipping: str) -> dict[str, torch.Tensor]:
    if clipping == "off":
        return grads
    if clipping == "value":
        return {name: grad.clamp(-MAX_NORM, MAX_NORM) for name, grad in grads.items()}

    def norm(*of: torch.Tensor) -> float:
        return sum((grad.abs() ** NORM_TYPE).sum().item() for grad in of) ** (1 / NORM_TYPE)

    norms = {name: norm(grad) for name, grad in grads.items()}
    if clipping == "full_model":
        norms = dict.fromkeys(grads, norm(*grads.values()))
    return {name: grad * min(1.0, MAX_NORM / norms[name]) for name, grad in grads.items()}


def reference(optimizer: str, clipping: str, steps, nesterov=False) -> dict[str, torch.Tensor]:
    """The parameters after the steps, by the papers' formulas."""
    parameters = {n: p.detach().clone() for n, p in small_model().named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in parameters.items()}
    second = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for step, passes in enumerate(steps, start=1):
        grads = {name: sum(grads[name] for grads in passes) for name in passes[0]}
        for name, grad in clipped(grads, clipping).items():
            lr, decay = HYPERPARAMETERS[name]
            if optimizer == "SGD":
                grad = grad + decay * parameters[name]
                first[name] = MOMENTUM * first[name] + grad
                change = grad + MOMENTUM * first[name] if nesterov else first[name]
                parameters[name] = parameters[name] - lr * change
                continue
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            parameters[name] = parameters[name] * (1 - lr * decay)
            parameters[name] = parameters[name] - lr * mean / (square.sqrt() + 1e-8)
    return parameters


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("clipping", ["off", "value", "norm", "full_model"])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("optimizer_name", ["SGD", "ADAMW"])
def test_optimizers_make_the_steps_of_their_formulas(optimizer_name, amp, clipping, passes, device):
    nesterov = passes == 2
    cfg = config(OPTIMIZER=optimizer_name, NESTEROV=nesterov)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clipping != "off"
    if clipping != "off":
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clipping
    model = small_model(device)
    optimizer = Trainer.build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(device.type, init_scale=AMP_SCALE, enabled=amp)
    steps = gradients(passes)

    def step(grads: list[dict[str, torch.Tensor]]) -> None:
        """As Detectron2's trainers; the gradients of the loss are those given."""
        optimizer.zero_grad()
        for passed in grads:
            named = dict(model.named_parameters())
            loss = sum((named[name] * grad.to(device)).sum() for name, grad in passed.items())
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for number, grads in enumerate(steps):
        if amp and number == 1:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            infinite = {**grads[0], "1.bias": torch.full_like(grads[0]["1.bias"], torch.inf)}
            step([*grads[1:], infinite])
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name]), name
            assert scaler.get_scale() == AMP_SCALE / 2
        step(grads)

    expected = reference(optimizer_name, clipping, steps, nesterov)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().cpu(), expected[name], atol=1e-5, rtol=1e-5)


def test_clipping_changes_the_steps_of_the_test_above():
    steps = gradients(1)
    for optimizer in ("SGD", "ADAMW"):
        found = [reference(optimizer, c, steps) for c in ("off", "value", "norm", "full_model")]
        for k, one in enumerate(found):
            for other in found[:k]:
                assert (one["0.weight"] - other["0.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize(("key", "value"), [("OPTIMIZER", "LION"), ("CLIP_TYPE", "length")])
def test_what_there_is_not_is_one_line(key, value):
    cfg = config()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    (cfg.SOLVER if key == "OPTIMIZER" else cfg.SOLVER.CLIP_GRADIENTS)[key] = value
    with pytest.raises(UserError, match=rf"SOLVER\..*{key} '{value}': allowed are .") as error:
        Trainer.build_optimizer(cfg, small_model())
    assert "\n" not in str(error.value)


MODES = [(CPU, False)]
if torch.cuda.is_available():  # mixed precision is for GPUs
    cuda = torch.device("cuda")
    MODES += [pytest.param(cuda, amp, marks=pytest.mark.gpu) for amp in (False, True)]


@pytest.mark.parametrize(("device", "amp"), MODES, indirect=["device"])
def test_a_training_is_resumed_but_not_with_other_classes(training_cfg, tmp_path, amp):
    cfg = training_cfg
    cfg.SOLVER.AMP.ENABLED = amp
    cfg.SOLVER.MAX_ITER = 2
    Trainer(cfg).train()
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert all(math.isfinite(last[f"loss_{name}"]) for name in ("sem_seg", "mask", "rpn_cls"))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2
    with TinyDataset(tmp_path / "tiny").registered() as name:
        cfg.DATASETS.TRAIN = (name,)
        other = Trainer(cfg)
        with pytest.raises(UserError, match=r"model_final\.pth: .* is for 5 thing classes, but"):
            other.resume_or_load(resume=True)


class StopBefore(HookBase):
    """Sends the signal of Ctrl-C in the last of so many iterations."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def before_step(self) -> None:
        if self.trainer.iter + 1 == self.iterations:
            signal.raise_signal(signal.SIGINT)


def train_until(
    cfg: CfgNode, iterations: int, *, evaluate: bool = False
) -> dict[str, torch.Tensor]:
    """Go on with a training as another process would; the parameters and buffers after it."""
    cfg = cfg.clone()
    cfg.TEST.EVAL_PERIOD = 1 if evaluate else 0
    cfg.DATASETS.TEST = ("shapes_val",) if evaluate else ()
    torch.manual_seed(0)  # of the first parameters alone
    trainer = Trainer(cfg)
    for seed in (torch.seed, random.seed, np.random.seed):  # no other process has its random state
        seed()
    trainer.resume_or_load(resume=True)
    if iterations < cfg.SOLVER.MAX_ITER:
        trainer.register_hooks([StopBefore(iterations)])
        with pytest.raises(Interrupted):
            trainer.train()
    else:
        trainer.train()
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


@on_cpu
@pytest.mark.parametrize(
    ("training", "sampler", "optimizer", "seed"),
    [
        ("joint", "TrainingSampler", "SGD", 3),
        ("alternate", "RepeatFactorTrainingSampler", "ADAMW", -1),
    ],
)
def test_a_resumed_training_ends_with_the_bits_of_one_that_was_not(
    training_cfg, tmp_path, training, sampler, optimizer, seed
):
    """With other numbers of workers, and evaluated or not, besides."""
    cfg = training_cfg
    cfg.MODEL.PANOPTIC_FPN.TRAINING, cfg.DATALOADER.SAMPLER_TRAIN = training, sampler
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.COLOR_AUG_SSD = (48, 64), True
    cfg.SOLVER.OPTIMIZER, cfg.SEED, cfg.SOLVER.MAX_ITER = optimizer, seed, 6
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (4,), 3
    cfg.OUTPUT_DIR = str(tmp_path / "in pieces")
    train_until(cfg, 1)
    cfg.DATALOADER.NUM_WORKERS = 2
    train_until(cfg, 3, evaluate=True)
    cfg.DATALOADER.NUM_WORKERS = 0
    found = train_until(cfg, 6)
    # Which seed a run without one drew is in its checkpoint.
    file = tmp_path / "in pieces" / "model_final.pth"
    saved = torch.load(file, weights_only=True)["trainer"]
    cfg.SEED, cfg.OUTPUT_DIR = saved["order"]["seed"], str(tmp_path / "whole")
    before = train_until(cfg, 5)
    expected = train_until(cfg, 6)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    name = "sem_seg_head.predictor.weight"
    assert not torch.equal(before[name], expected[name])


@on_cpu
def test_a_loss_that_is_no_number_is_told_with_its_images(training_cfg, monkeypatch):
    cfg = training_cfg
    cfg.SOLVER.MAX_ITER, cfg.SEED = 5, 3
    trainer = Trainer(cfg)
    seen, forward = [], trainer.model.forward

    def spoiled(batch):
        seen.append([image["file_name"] for image in batch])
        losses = forward(batch)
        return {**losses, "loss_cls": losses["loss_cls"] * (math.nan if len(seen) == 3 else 1)}

    monkeypatch.setattr(trainer.model, "forward", spoiled)
    with pytest.raises(
        UserError, match=r"nan at iteration 2: .*loss_cls nan, .*lower SOLVER.BASE"
    ) as e:
        trainer.train()
    assert ", of " + ", ".join(seen[2]) + " (seed 3)" in str(e.value)
    assert "\n" not in str(e.value) and len(seen) == 3


class Dies(PanopticFPNMapper):
    """Ends its process at an image."""

    def __call__(self, record: dict) -> dict:
        if record["file_name"].endswith("3.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(record)


class DiesEvaluating(Dies):
    def __call__(self, record: dict) -> dict:
        return (
            PanopticFPNMapper.__call__(self, record) if self.is_train else super().__call__(record)
        )


@on_cpu
@pytest.mark.faults
@pytest.mark.parametrize("mapper", [Dies, DiesEvaluating])
def test_a_process_that_dies_loading_is_told_with_its_image(
    training_cfg, monkeypatch, caplog, mapper
):
    monkeypatch.setattr("panoptic_fpn_ext.engine.trainer.PanopticFPNMapper", mapper)
    cfg = training_cfg
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.DATALOADER.NUM_WORKERS = 12, 1, 1
    cfg.DATASETS.TEST = ("shapes_val",)
    split = "train" if mapper is Dies else "val"
    message = rf"^dataset shapes_{split}: .*{split}/0+3\.jpg: .*signal: Killed; .*NUM_WORKERS$"
    with pytest.raises(UserError, match=message):
        Trainer(cfg).train()
    assert not [entry for entry in caplog.records if entry.exc_info]


@on_cpu
def test_a_new_order_is_said(training_cfg, caplog):
    cfg = training_cfg
    cfg.SOLVER.MAX_ITER = 3
    train_until(cfg, 1)
    train_until(cfg, 2)
    assert "order of the images is a new one" not in caplog.text
    cfg.SOLVER.IMS_PER_BATCH = 4
    train_until(cfg, 3)
    assert "'images': 2" in caplog.text and "order of the images is a new one" in caplog.text


@on_cpu
@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("square_root", [True, False])
def test_images_with_rare_things_are_repeated(training_cfg, tmp_path, square_root, instances):
    """One image of 8 has a person; by LVIS's formula it comes twice or four times an epoch."""
    cfg = training_cfg
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    if "REPEAT_SQRT" in cfg.DATALOADER:
        cfg.DATALOADER.REPEAT_SQRT = square_root
    elif not square_root:
        pytest.skip("a key of Detectron2's main")
    dataset = TinyDataset(tmp_path / "tiny", num_images=8)
    counted = dataset.instances if instances else dataset.panoptic
    for annotation in counted["annotations"]:
        for labelled in annotation.get("segments_info", [annotation]):
            if annotation["image_id"] > 1 and labelled["category_id"] == PERSON_CATEGORY:
                labelled["category_id"] = CAR_CATEGORY
    dataset.write()
    repeats = 2 if square_root else 4
    with dataset.registered(instances) as name:
        cfg.DATASETS.TRAIN = (name,)
        batches = islice(Trainer.build_train_loader(cfg), 2 * (7 + repeats))
        times = Counter(record["image_id"] for (record,) in batches)
    assert times == {1: 2 * repeats, **dict.fromkeys(range(2, 9), 2)}


@on_cpu
def test_things_are_told_from_stuff_where_segments_do_not_say(training_cfg, monkeypatch):
    """As in Detectron2's Cityscapes, whose things and stuff share one range of ids."""
    cfg = training_cfg
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.SOLVER.IMS_PER_BATCH = "RepeatFactorTrainingSampler", 1
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    classes = ["sky", "car", "grass", "ship"]
    segments = [[{"category_id": c} for c in ids] for ids in ([0, 1], [1], [1, 2], [1, 3])]
    records = [
        {"image_id": k, "segments_info": infos, "height": 1, "width": 1}
        for k, infos in enumerate(segments)
    ]
    monkeypatch.setattr(PanopticFPNMapper, "__call__", lambda self, record: record)
    cfg.DATASETS.TRAIN = ("shared_range",)
    metadata = MetadataCatalog.get("shared_range")
    metadata.set(thing_classes=classes, stuff_classes=classes)
    metadata.set(thing_dataset_id_to_contiguous_id={7: 1, 9: 3})
    DatasetCatalog.register("shared_range", lambda: records)
    try:
        batches = islice(Trainer.build_train_loader(cfg), 5)
        times = Counter(record["image_id"] for (record,) in batches)
    finally:
        DatasetCatalog.remove("shared_range")
        MetadataCatalog.remove("shared_range")
    assert times == {0: 1, 1: 1, 2: 1, 3: 2}  # of the ship's frequency of 1 / 4


@on_cpu
@pytest.mark.parametrize("filtered", [True, False])
def test_images_without_things_are_filtered_where_they_are_repeated(
    training_cfg, tmp_path, filtered
):
    cfg = training_cfg
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filtered
    dataset = TinyDataset(tmp_path / "tiny", num_images=3)
    kept = [a for a in dataset.instances["annotations"] if a["image_id"] != 2]
    dataset.instances["annotations"] = kept
    dataset.write()
    with dataset.registered(instances=True) as name:
        cfg.DATASETS.TRAIN = (name,)
        batches = [batch for (batch,) in islice(Trainer.build_train_loader(cfg), 4)]
    assert {record["image_id"] for record in batches} == {1, 3, *({} if filtered else {2})}
    assert {len(record["instances"]) for record in batches} == {2, *({} if filtered else {0})}


@on_cpu
@pytest.mark.parametrize("is_main", [True, False])
def test_scores_are_written_as_json_by_one_process(training_cfg, tmp_path, monkeypatch, is_main):
    results = {"panoptic_seg": {"PQ": 12.5, "PQ-cat": float("nan")}}
    monkeypatch.setattr(DefaultTrainer, "test", lambda *args: results)
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: is_main)
    assert Trainer.test(training_cfg, small_model()) == results
    path = tmp_path / "inference" / "metrics.json"
    assert path.exists() == is_main
    if is_main:
        expected = {"panoptic_seg/PQ": 12.5, "panoptic_seg/PQ-cat": None}
        assert json.loads(path.read_text()) == expected


@on_cpu
@pytest.mark.parametrize("names", [("shapes_val",), ("shapes_val", "shapes_train")])
def test_each_of_several_datasets_has_a_folder(training_cfg, tmp_path, monkeypatch, names):
    folders = []
    monkeypatch.setattr(
        trainer, "build_evaluator", lambda cfg, name, folder: folders.append(folder)
    )
    training_cfg.DATASETS.TEST = names
    for name in names:
        Trainer.build_evaluator(training_cfg, name)
    inference = tmp_path / "inference"
    assert folders == [str(inference / n if len(names) > 1 else inference) for n in names]


@on_cpu
def test_images_are_evaluated_as_they_are(training_cfg):
    training_cfg.INPUT.MIN_SIZE_TEST = 32
    loader = Trainer.build_test_loader(training_cfg, "shapes_val")
    (record,) = next(iter(loader))
    assert record["image"].shape == (3, 32, 32)
    assert not {"instances", "sem_seg"} & record.keys()
    assert len(loader) == 6


@on_cpu
@pytest.mark.parametrize("rounds", [[1], [1, 2], [2]])
def test_an_evaluator_that_fails_stops_no_training(training_cfg, tmp_path, monkeypatch, rounds):
    """It fails in some of the two evaluations of a training; only the last one's outcome counts."""

    class Failing(DatasetEvaluator):
        evaluations = 0

        def evaluate(self) -> dict:
            Failing.evaluations += 1
            if Failing.evaluations in rounds:
                raise ZeroDivisionError("no reason")
            return {"failing": {"score": 1.0}}

    failing = needs("sem_seg")(lambda dataset_name, output_folder: Failing())
    monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, "failing", failing)
    cfg = training_cfg
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 2, 1
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2, 2
    with TinyDataset(tmp_path / "tiny").registered(evaluators=("failing", "sem_seg")) as name:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        training = Trainer(cfg)
        if 2 in rounds:
            reason = "evaluation is not complete: Failing: ZeroDivisionError: no reason"
            with pytest.raises(UserError, match=f"^{reason}$"):
                training.train()
        else:
            training.train()
    assert Failing.evaluations == 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    expected = {"sem_seg/mIoU"} | ({"failing/score"} if 2 not in rounds else set())
    scores = json.loads((tmp_path / "inference" / "metrics.json").read_text())
    assert scores.keys() & {"sem_seg/mIoU", "failing/score"} == expected
    logged = (tmp_path / "metrics.json").read_text()
    assert "sem_seg/mIoU" in logged
    assert ("failing/score" in logged) == (rounds != [1, 2])


@on_cpu
@pytest.mark.parametrize("called", ["sky", "car"])
@pytest.mark.parametrize("label_space", ["separated", "full"])
def test_a_category_called_things_has_scores_of_its_own(
    training_cfg, tmp_path, called, label_space
):
    cfg = training_cfg
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80, 54  # the dataset's
    cfg.INPUT.MIN_SIZE_TEST = 32
    dataset = TinyDataset(tmp_path / "tiny")
    renamed = [
        {**c, "name": "things" if c["name"] == called else c["name"]}
        for c in dataset.panoptic["categories"]
    ]
    dataset.panoptic["categories"] = renamed
    dataset.write()
    assert check_panoptic_dataset(**dataset.paths()).faults == []
    with dataset.registered(label_space=label_space) as name:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        cfg = resolve_config(cfg)
        training = Trainer(cfg)
        training.train()
        (record,) = next(iter(Trainer.build_test_loader(cfg, name)))
        classes = torch.arange(24 * 32).reshape(24, 32) % cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        drawing = Visualizer(np.zeros((24, 32, 3), np.uint8), MetadataCatalog.get(name))
        drawing.draw_sem_seg(classes)
        model = training.model.eval()
        with torch.no_grad():
            drawing.draw_panoptic_seg(*model([record])[0]["panoptic_seg"])
    scores = json.loads((tmp_path / "inference" / "metrics.json").read_text())
    names = {c["name"] for c in renamed}
    assert {k.removeprefix("panoptic_seg/PQ-") for k in scores if "PQ-" in k} == names
    things = {c["name"] for c in renamed if c["isthing"]}
    assert {k.removeprefix("bbox/AP-") for k in scores if "bbox/AP-" in k} == things
    semantic = names
    if label_space == "separated":
        semantic = {"sky", "things"} if called == "car" else {"things", "all things"}
    assert {k.removeprefix("sem_seg/IoU-") for k in scores if "/IoU-" in k} == semantic
