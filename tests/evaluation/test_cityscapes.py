"""The Cityscapes evaluators against cityscapesscripts' own programs, run on files."""

import itertools
import logging
import math
from pathlib import Path

import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as instance_level
import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as pixel_level
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label, labels, name2label, trainId2label
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.builtin import register_cityscapes
from panoptic_fpn_ext.evaluation import DETECTRON2_EVALUATOR_REGISTRY, EVALUATOR_REGISTRY
from panoptic_fpn_ext.evaluation.cityscapes_instances import CityscapesInstanceEvaluator
from panoptic_fpn_ext.evaluation.cityscapes_sem_seg import CityscapesSemSegEvaluator

from ..conftest import moved
from .conftest import in_parts

CLASSES = [trainId2label[i].name for i in range(19)]
THINGS = [name for name in CLASSES if name2label[name].hasInstances]
NAME = "test_cityscapes_val"
SIZE = (48, 64)


class Scene:
    """The true ids and the predictions of one image, at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        ids = np.kron(rng.choice([0, 4, 7, 8, 11, 21, 23], (3, 4)), np.ones((16, 16), int))
        # Groups, kinds of thing that are not evaluated, instances smaller and larger than 100
        # pixels; often of the same few classes, so that they meet.
        kinds = [24, 25, 26, 29, 33]
        for number in range(rng.integers(0, 8)):
            label = int(rng.choice(kinds))
            window = self.window(rng)
            ids[window] = label if rng.random() < 0.2 else label * 1000 + number
        self.ids = ids.astype(np.uint16)

        masks, classes = [], []
        for i in np.unique(ids[ids >= 24]):
            for _ in range(rng.integers(0, 3)):
                mask = np.roll(ids == i, rng.integers(-3, 4, 2), (0, 1))
                label = i // 1000 or i
                name = id2label[int(label)].name
                masks.append(mask)
                classes.append(THINGS.index(name if name in THINGS else "car"))
        for _ in range(rng.integers(0, 3)):
            masks.append(np.zeros(SIZE, bool))
            if rng.random() < 0.8:
                masks[-1][self.window(rng)] = True
            classes.append(int(rng.choice([0, 1, 2, 7])))
        self.instances = Instances(SIZE)
        self.instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *SIZE))
        self.instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        # Scores often coincide.
        self.instances.scores = torch.from_numpy(
            rng.integers(1, 6, len(classes)).astype(np.float32) / 7
        )

        noise = np.kron(rng.integers(0, 19, (12, 16)), np.ones((4, 4), int))
        train_ids = np.array([id2label[i].trainId for i in range(34)])
        true = train_ids[np.where(ids >= 1000, ids // 1000, ids)]
        keep = np.kron(rng.random((12, 16)) < 0.6, np.ones((4, 4), bool)) & (true < 19)
        self.sem_seg = torch.nn.functional.one_hot(
            torch.from_numpy(np.where(keep, true, noise)), 19
        ).permute(2, 0, 1)

    @staticmethod
    def window(rng: np.random.Generator) -> tuple[slice, slice]:
        y, x, h, w = (int(rng.integers(*ends)) for ends in ((0, 40), (0, 56), (5, 30), (5, 30)))
        return slice(y, y + h), slice(x, x + w)


def write_tree(root: Path, scenes: list[Scene]) -> None:
    """Write ground truth in the layout of Cityscapes, and run createPanopticImgs on it."""
    for i, scene in enumerate(scenes):
        city = "ulm" if i % 2 else "bonn"
        stem = root / "gtFine" / "val" / city / f"{city}_{i:06d}_000019_gtFine"
        stem.parent.mkdir(parents=True, exist_ok=True)
        ids = scene.ids
        Image.fromarray(ids).save(f"{stem}_instanceIds.png")
        label_ids = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
        Image.fromarray(label_ids).save(f"{stem}_labelIds.png")
    convert2panoptic(str(root / "gtFine"), setNames=["val"])


@pytest.fixture(autouse=True)
def numpy_as_cityscapesscripts_knows_it(monkeypatch):
    """Before NumPy 2.4, with which its programs do not run."""
    count_nonzero = np.count_nonzero
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(np, "count_nonzero", lambda array: int(count_nonzero(array)))


@pytest.fixture
def dataset(tmp_path, capfd):
    """Random scenes as a registered dataset: its records, outputs, scenes and root."""

    def make(seed: int, number: int):
        for split in ("train", "val"):
            if f"test_cityscapes_{split}" in DatasetCatalog.list():
                DatasetCatalog.remove(f"test_cityscapes_{split}")
                MetadataCatalog.remove(f"test_cityscapes_{split}")
        root = tmp_path / str(next(counter))
        rng = np.random.default_rng(seed)
        scenes = [Scene(rng) for _ in range(number)]
        write_tree(root, scenes)
        register_cityscapes(root, "test_cityscapes")
        scenes = {f"{'ulm' if i % 2 else 'bonn'}_{i:06d}_000019": s for i, s in enumerate(scenes)}
        records = DatasetCatalog.get(NAME)
        outputs = [
            {"sem_seg": scenes[r["image_id"]].sem_seg, "instances": scenes[r["image_id"]].instances}
            for r in records
        ]
        return records, outputs, root

    counter = itertools.count()
    yield make
    for split in ("train", "val"):
        DatasetCatalog.remove(f"test_cityscapes_{split}")
        MetadataCatalog.remove(f"test_cityscapes_{split}")


def pixel_level_scores(records: list[dict], outputs: list[dict], root: Path) -> dict:
    """What evalPixelLevelSemanticLabeling gives."""
    folder = root / "results"
    folder.mkdir(exist_ok=True)
    predictions, truths = [], []
    to_id = np.array([trainId2label[i].id for i in range(19)], np.uint8)
    for record, output in zip(records, outputs, strict=True):
        predictions.append(str(folder / f"{record['image_id']}.png"))
        Image.fromarray(to_id[output["sem_seg"].argmax(dim=0).numpy()]).save(predictions[-1])
        city = record["image_id"].partition("_")[0]
        name = f"{record['image_id']}_gtFine_labelIds.png"
        truths.append(str(root / "gtFine" / "val" / city / name))
    args = pixel_level.args
    args.quiet, args.JSONOutput = True, False
    return pixel_level.evaluateImgLists(predictions, truths, args)


def instance_level_scores(records: list[dict], outputs: list[dict], root: Path) -> dict:
    """What evalInstanceLevelSemanticLabeling gives."""
    folder = root / "results"
    folder.mkdir(exist_ok=True)
    predictions, truths = [], []
    for record, output in zip(records, outputs, strict=True):
        lines = []
        instances = output["instances"]
        for i in range(len(instances)):
            name = f"{record['image_id']}_{i}.png"
            Image.fromarray(instances.pred_masks[i].numpy().astype(np.uint8)).save(folder / name)
            label = name2label[THINGS[instances.pred_classes[i]]].id
            lines.append(f"{name} {label} {float(instances.scores[i])!r}\n")
        predictions.append(str(folder / f"{record['image_id']}.txt"))
        Path(predictions[-1]).write_text("".join(lines))
        city = record["image_id"].partition("_")[0]
        name = f"{record['image_id']}_gtFine_instanceIds.png"
        truths.append(str(root / "gtFine" / "val" / city / name))
    args = instance_level.args
    args.quiet, args.JSONOutput, args.predictionPath = True, False, str(folder)
    args.gtInstancesFile = str(root / "gtInstances.json")
    instance_level.setInstanceLabels(args)
    found = instance_level.getGtInstances(truths, args)
    matches = instance_level.matchGtWithPreds(predictions, truths, found, args)
    scores = instance_level.evaluateMatches(matches, args)
    return instance_level.computeAverages(scores, args)


def evaluate(evaluator, records, outputs):
    evaluator.reset()
    evaluator.process(records, outputs)
    (results,) = evaluator.evaluate().values()
    return results


PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(seed=st.integers(0, 2**32), number=st.integers(1, 4))
def test_semantic_scores_equal_cityscapesscripts(dataset, seed, number):
    records, outputs, root = dataset(seed, number)
    results = evaluate(CityscapesSemSegEvaluator.from_dataset(NAME), records, outputs)
    expected = pixel_level_scores(records, outputs, root)
    averages = {
        "IoU": expected["averageScoreClasses"],
        "mIoU": expected["averageScoreClasses"],
        "iIoU": expected["averageScoreInstClasses"],
        "IoU_sup": expected["averageScoreCategories"],
        "iIoU_sup": expected["averageScoreInstCategories"],
    }
    for key, value in averages.items():
        assert results[key] == pytest.approx(100 * value, rel=1e-12, nan_ok=True), key
    categories = {name2label[name].category for name in CLASSES}
    for key, names, scores in (
        ("iIoU", THINGS, expected["classInstScores"]),
        ("IoU_sup", categories, expected["categoryScores"]),
        ("iIoU_sup", ("human", "vehicle"), expected["categoryInstScores"]),
    ):
        of_key = {k for k in results if k.startswith(f"{key}-")}
        assert of_key == {f"{key}-{name}" for name in names}
        for name in names:
            value = results[f"{key}-{name}"]
            assert value == pytest.approx(100 * scores[name], rel=1e-12, nan_ok=True), (key, name)


@PROPERTY
@given(seed=st.integers(0, 2**32), number=st.integers(1, 5))
def test_instance_scores_equal_cityscapesscripts(dataset, seed, number):
    records, outputs, root = dataset(seed, number)
    results = evaluate(CityscapesInstanceEvaluator.from_dataset(NAME), records, outputs)
    try:
        expected = instance_level_scores(records, outputs, root)
    except IndexError:  # it cannot take a class whose every detection is ignored
        return
    assert results["AP"] == pytest.approx(100 * expected["allAp"], rel=1e-12, nan_ok=True)
    assert results["AP50"] == pytest.approx(100 * expected["allAp50%"], rel=1e-12, nan_ok=True)
    for name in THINGS:
        of_class = expected["classes"][name]
        for key, score in (("AP", of_class["ap"]), ("AP50", of_class["ap50%"])):
            assert results[f"{key}-{name}"] == pytest.approx(100 * score, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", ["cityscapes_sem_seg", "cityscapes_instances"])
def test_detectron2s_evaluators_take_our_datasets_and_agree(
    dataset, tmp_path, monkeypatch, name, device
):
    monkeypatch.chdir(tmp_path)  # where cityscapesscripts leaves a matches.json
    records, outputs, _ = dataset(5, 6)
    outputs = moved(outputs, device)
    ours = evaluate(EVALUATOR_REGISTRY.get(name)(NAME, str(tmp_path)), records, outputs)
    theirs = DETECTRON2_EVALUATOR_REGISTRY.get(name)(NAME, str(tmp_path))
    try:
        expected = evaluate(theirs, records, outputs)
    except ImportError as error:  # newer than v0.6, it needs what only its authors have
        pytest.skip(str(error))
    assert expected
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-12), key


def test_the_random_scenes_are_hard_enough(dataset):
    """What the two tests above compare is neither trivial nor all the same."""
    records, outputs, _ = dataset(0, 40)
    results = evaluate(CityscapesInstanceEvaluator.from_dataset(NAME), records, outputs)
    assert 5 < results["AP"] < results["AP50"] < 95
    results = evaluate(CityscapesSemSegEvaluator.from_dataset(NAME), records, outputs)
    assert abs(results["iIoU"] - results["IoU"]) > 1


def scores_of_instances(dataset, predictions: list[tuple[np.ndarray, list[np.ndarray]]]):
    """Our and the official scores of images with the given ids, each mask predicted as a car."""
    records, _, root = dataset(0, len(predictions))
    outputs = []
    for record, (ids, masks) in zip(records, predictions, strict=True):
        (gt,) = root.glob(f"gtFine/val/*/{record['image_id']}_gtFine_instanceIds.png")
        Image.fromarray(ids.astype(np.uint16)).save(gt)
        instances = Instances(SIZE)
        instances.pred_masks = torch.from_numpy(np.array(masks))
        instances.pred_classes = torch.full((len(masks),), THINGS.index("car"))
        instances.scores = torch.linspace(0.9, 0.1, len(masks))
        outputs.append({"instances": instances})
    with np.errstate(all="raise"):
        results = evaluate(CityscapesInstanceEvaluator.from_dataset(NAME), records, outputs)
    expected = instance_level_scores(records, outputs, root)["classes"]["car"]
    return results["AP-car"], pytest.approx(100 * expected["ap"], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(("width", "expected"), [(10, 100), (9, math.nan)])
def test_an_instance_is_evaluated_from_100_pixels_on(dataset, width, expected):
    ids = np.full(SIZE, 7)
    ids[:10, :width] = 26000
    empty = ids == 99
    ours, official = scores_of_instances(dataset, [(ids, [ids == 26000, empty])])
    assert ours == official
    assert ours == pytest.approx(expected, nan_ok=True)


def test_an_image_may_hold_many_instances(dataset):
    ids = 26000 + np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) // 10
    ids[-2:] = 26999
    ours, official = scores_of_instances(dataset, [(ids, [ids == 26999])])
    assert ours == official == 100


def test_instances_of_several_images_are_told_apart(dataset):
    ids = np.full(SIZE, 26000)
    ours, official = scores_of_instances(dataset, [(ids, [ids > 0]), (ids, [ids > 0])])
    assert ours == official == 100


def test_only_categories_of_things_alone_have_iiou():
    results = CityscapesSemSegEvaluator(
        stuff_classes=["road", "car", "sky", "bus"],
        thing_sem_seg_ids=(1, 3),
        categories=["ground", "mixed", "mixed", "vehicle"],
        average_areas=(1.0, 1.0),
    ).evaluate()["sem_seg"]
    of_categories = [key for key in results if key.startswith("iIoU_sup-")]
    assert of_categories == ["iIoU_sup-vehicle"]


def test_a_class_whose_every_detection_is_ignored_has_ap_0(dataset):
    records, _, root = dataset(0, 1)
    ids = np.full(SIZE, 7, np.uint16)
    ids[:20, :20], ids[30:, 30:] = 26, 26000  # a group, and a car that is missed
    (gt,) = root.glob("gtFine/val/*/*_instanceIds.png")
    Image.fromarray(ids).save(gt)
    instances = Instances(SIZE)
    instances.pred_masks = torch.from_numpy(ids == 26)[None]
    instances.pred_classes = torch.tensor([THINGS.index("car")])
    instances.scores = torch.tensor([0.9])
    evaluator = CityscapesInstanceEvaluator.from_dataset(NAME)
    results = evaluate(evaluator, records, [{"instances": instances}])
    assert results["AP"] == results["AP-car"] == 0
    assert math.isnan(results["AP-bus"])


@pytest.mark.parametrize("evaluator", [CityscapesSemSegEvaluator, CityscapesInstanceEvaluator])
def test_processes_order_and_repeats_change_nothing(dataset, evaluate_in_processes, evaluator):
    records, outputs, _ = dataset(3, 7)
    expected = evaluate(evaluator.from_dataset(NAME, distributed=False), records, outputs)
    for num_parts in (1, 2, 3):
        parts = in_parts(np.random.default_rng(num_parts), num_parts, records * 2, outputs * 2)
        (results,) = evaluate_in_processes(lambda: evaluator.from_dataset(NAME), parts).values()
        assert repr(results) == repr(expected)  # to the last digit; nan is nan


@pytest.mark.parametrize("name", ["cityscapes_sem_seg", "cityscapes_instances"])
def test_reset_forgets_and_the_log_has_tables(dataset, caplog, tmp_path, name):
    records, outputs, _ = dataset(1, 3)
    evaluator = EVALUATOR_REGISTRY.get(name)(NAME, str(tmp_path))
    with caplog.at_level(logging.INFO):
        expected = evaluate(evaluator, records, outputs)
    assert repr(evaluate(evaluator, records, outputs)) == repr(expected)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines()]
    assert any(row[:1] == ["person"] for row in rows)
    assert any(row[:2] in (["IoU", "iIoU"], ["AP", "AP50"]) for row in rows)


def test_nothing_to_evaluate_is_nan(dataset):
    dataset(1, 1)
    for evaluator in (CityscapesSemSegEvaluator, CityscapesInstanceEvaluator):
        assert all(map(math.isnan, evaluate(evaluator.from_dataset(NAME), [], []).values()))


def test_a_segment_that_others_cover_changes_nothing(dataset):
    records, outputs, _ = dataset(1, 1)
    evaluator = CityscapesSemSegEvaluator.from_dataset(NAME)
    expected = evaluate(evaluator, records, outputs)
    covered = {"id": 77, "category_id": 0, "isthing": True}
    records = [{**records[0], "segments_info": [*records[0]["segments_info"], covered]}]
    evaluator.reset()
    np.testing.assert_equal(evaluate(evaluator, records, outputs), expected)


def test_faults_are_named(dataset):
    records, outputs, root = dataset(1, 1)
    evaluator = CityscapesInstanceEvaluator.from_dataset(NAME)
    with pytest.raises(UserError, match=r"_leftImg8bit\.png has no instances, only \['sem_seg'\]"):
        evaluator.process(records, [{"sem_seg": None}])
    small = Instances((9, 9), pred_masks=torch.zeros(1, 9, 9, dtype=torch.bool))
    with pytest.raises(UserError, match=r"is 9 x 9 pixels .* but .*_instanceIds\.png is 48 x 64"):
        evaluator.process(records, [{"instances": small}])
    with pytest.raises(UserError, match=r"is 9 x 9 pixels .* but .*_panoptic\.png is 48 x 64"):
        CityscapesSemSegEvaluator.from_dataset(NAME).process(
            records, [{"sem_seg": torch.zeros(19, 9, 9)}]
        )
    (gt,) = root.glob("gtFine/val/*/*_instanceIds.png")
    Image.new("L", SIZE[::-1]).save(gt)
    with pytest.raises(UserError, match="expected a 16-bit grey PNG of instance ids"):
        evaluator.process(records, outputs)
    gt.write_bytes(gt.read_bytes()[:60])
    with pytest.raises(UserError, match=r"_instanceIds\.png: cannot read"):
        evaluator.process(records, outputs)
    gt.unlink()
    with pytest.raises(UserError, match="cannot read the instance ids: No such file"):
        evaluator.process(records, outputs)


def test_void_labels_are_those_of_cityscapesscripts(dataset):
    dataset(0, 1)
    ignored = {label.id for label in labels if label.ignoreInEval}
    assert CityscapesInstanceEvaluator.from_dataset(NAME)._void_label_ids == ignored
