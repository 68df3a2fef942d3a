"""tools/tune_merging.py: the sweep against merging and evaluating at one setting after another,
and the whole tool against train_net.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext import PanopticQualityEvaluator, UserError
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png
from panoptic_fpn_ext.engine import setup_prediction
from panoptic_fpn_ext.modeling import merge_panoptic

from ..conftest import CONFIG, REPOSITORY, SMALL, train_net

sys.path.insert(0, str(REPOSITORY / "tools"))
import tune_merging as tool

THINGS = ("a", "b")
STUFF = ("things", "c", "d", "e")
THING_SEM_SEG_IDS = {0}
CATEGORIES = [(True, 0), (True, 1), (False, 1), (False, 2), (False, 3)]
GRID = tool.Setting(
    score=(0.1, 0.3, 0.7), overlap=(0.0, 0.4, 0.9), nms=(0.2, 0.5, 1.0), stuff_area=(0, 40, 10**6)
)
METRICS = ("PQ", "PQ_th", "PQ_st")


def random_output(seed: int, num_instances: int, size=(24, 32)) -> dict:
    """What a model returns: overlapping discs, some empty, with equal scores; blocks of stuff."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks, boxes = torch.zeros(num_instances, *size, dtype=torch.bool), []
    for mask in masks:
        cy, cx, r = (torch.rand(3, generator=rng) * torch.tensor([height, width, 10])).tolist()
        mask |= (y - cy) ** 2 + (x - cx) ** 2 < (r - 1) * abs(r - 1)
        boxes.append([cx - r, cy - r, cx + r, cy + r])
    scores = torch.randint(1, 11, (num_instances,), generator=rng) / 10
    blocks = torch.randint(0, len(STUFF), (height // 8, width // 8), generator=rng)
    sem_seg = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return {
        "sem_seg": torch.nn.functional.one_hot(sem_seg, len(STUFF)).permute(2, 0, 1).float(),
        "instances": Instances(
            size,
            pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
            scores=scores,
            pred_classes=torch.randint(0, len(THINGS), (num_instances,), generator=rng),
            pred_masks=masks,
        ),
    }


def random_ground_truth(output: dict, seed: int) -> tuple[np.ndarray, list[dict]]:
    """Something like the output: moved, with void, several segments of a class and crowds."""
    rng = np.random.default_rng(seed)
    labels = output["sem_seg"].argmax(0).numpy()
    ids = np.where(labels == 0, 0, 10 * labels + (np.arange(labels.shape[1]) > 20))
    categories = {int(i): (False, int(i) // 10) for i in np.unique(ids) if i}
    for number, mask in enumerate(output["instances"].pred_masks.numpy()):
        if rng.random() < 0.6:
            ids[np.roll(mask, 1, axis=int(rng.integers(2)))] = 100 + number
            categories[100 + number] = (True, int(output["instances"].pred_classes[number]))
    segments = [
        {"id": i, "isthing": isthing, "category_id": c, "iscrowd": int(rng.random() < 0.15)}
        for i, (isthing, c) in categories.items()
        if (ids == i).any()
    ]
    return ids.astype(np.int32), segments


def dataset(folder: Path, seed: int, numbers: list[int]) -> list[tuple[dict, dict]]:
    """Model outputs, and the dataset's records of their images."""
    images = []
    for place, number in enumerate(numbers):
        output = random_output(seed + place, number)
        ids, segments = random_ground_truth(output, seed + place)
        png = folder / f"{place}.png"
        write_panoptic_png(png, ids)
        record = {"file_name": f"{place}.jpg", "image_id": place, "pan_seg_file_name": str(png)}
        images.append((output, {**record, "segments_info": segments}))
    return images


def evaluated(images: list[tuple[dict, dict]], setting: tool.Setting) -> list[float]:
    """PQ, PQ_th and PQ_st of the evaluator at one setting."""
    evaluator = PanopticQualityEvaluator(
        thing_classes=THINGS,
        stuff_classes=STUFF,
        thing_sem_seg_ids=(0,) * len(THINGS),
        distributed=False,
    )
    for output, record in images:
        panoptic_seg = merge_panoptic(
            output["instances"],
            output["sem_seg"].argmax(0),
            thing_sem_seg_ids=THING_SEM_SEG_IDS,
            instances_score_thresh=setting.score,
            overlap_threshold=setting.overlap,
            nms_thresh=setting.nms,
            stuff_area_thresh=setting.stuff_area,
        )
        evaluator.process([record], [{"panoptic_seg": panoptic_seg}])
    scores = evaluator.evaluate()["panoptic_seg"]
    return [scores[metric] for metric in METRICS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    numbers=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    places=st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=4, max_size=4),
)
def test_every_setting_scores_exactly_as_merged_and_evaluated_alone(
    folder: Path, seed, numbers, places
):
    images = dataset(folder, seed, numbers)
    totals = tool.Totals(GRID, CATEGORIES)
    for output, record in images:
        tool.RawOutputs.from_model(output).save(folder / "kept.npz")
        totals.add(tool.count_kept((folder / "kept.npz", record), GRID, THING_SEM_SEG_IDS))
    qualities = totals.qualities()
    for place in places:
        setting = tool.Setting(*(axis[i] for axis, i in zip(GRID, place, strict=True)))
        found = [qualities[metric][place] for metric in METRICS]
        assert np.array_equal(found, evaluated(images, setting), equal_nan=True), setting


@pytest.mark.parametrize("num_instances", [0, 7])
def test_kept_outputs_are_the_models(tmp_path: Path, num_instances: int):
    output = random_output(3, num_instances)
    path = tmp_path / "kept.npz"
    tool.RawOutputs.from_model(output).save(path)
    kept = tool.RawOutputs.load(path)
    assert np.array_equal(kept.sem_seg, output["sem_seg"].argmax(0))
    instances, expected = kept.instances(lowest_score=0.0), output["instances"]
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(instances.scores, expected.scores)
    assert torch.equal(instances.pred_classes, expected.pred_classes)
    for number, mask in enumerate(expected.pred_masks):
        whole = torch.zeros_like(mask)
        where, part = instances.pred_masks.window(number)
        whole[where] = part
        assert torch.equal(whole, mask)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npz"]


def test_a_category_that_the_dataset_has_not_is_an_error(tmp_path: Path):
    (output, record), *_ = dataset(tmp_path, 5, [4])
    counts = tool.count_image(
        tool.RawOutputs.from_model(output),
        read_panoptic_png(record["pan_seg_file_name"]),
        record["segments_info"],
        GRID,
        THING_SEM_SEG_IDS,
    )
    with pytest.raises(UserError, match="thing category 1"):
        tool.Totals(GRID, [c for c in CATEGORIES if c != (True, 1)]).add(counts)


class TestResult:
    """The best setting and what its thresholds are worth."""

    GRID = tool.Setting(score=(0.3, 0.5, 0.7), overlap=(0.5,), nms=(0.5, 1.0), stuff_area=(64,))
    OWN = tool.Setting(score=0.5, overlap=0.5, nms=1.0, stuff_area=64)

    def result(self, pq: list[list[float]]) -> tool.Result:
        table = np.array(pq).reshape(3, 1, 2, 1)
        return tool.Result(self.GRID, self.OWN, {"PQ": table, "PQ_th": table, "PQ_st": table})

    def test_the_highest_pq(self):
        result = self.result([[40, 41], [44, 42], [43, 40]])
        assert result.setting(result.best) == (0.5, 0.5, 0.5, 64)
        assert result.setting(result.own) == self.OWN

    def test_of_equal_ones_that_closest_to_the_config(self):
        result = self.result([[44, 42], [40, 41], [44, 44]])
        assert result.setting(result.best) == (0.7, 0.5, 1.0, 64)
        assert self.result([[44] * 2] * 3).best == result.own

    def test_worth_is_the_loss_of_one_threshold_alone(self):
        rows = tool.report(self.result([[47.5, 41], [44, 42], [43, 40]])).splitlines()
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
        assert ["score", "0.5", "0.3", "3.50"] in cells
        assert ["nms", "1", "0.5", "6.50"] in cells
        assert ["overlap", "0.5", "0.5", "0.00"] in cells

    def test_without_segments_there_is_nothing_to_tune(self):
        with pytest.raises(UserError, match="no segments"):
            self.result([[np.nan] * 2] * 3)

    def test_the_plot_hides_nothing(self):
        """The legend is beside the panels; PQ of things alone, which is PQ, is seen with it."""
        result = self.result([[47.5, 41], [44, 42], [43, 40]])
        result.qualities["PQ_st"] = np.full((3, 1, 2, 1), np.nan)
        figure = tool.draw(result)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert not any(
            legend.get_window_extent().overlaps(a.get_window_extent()) for a in figure.axes
        )
        assert [text.get_text() for text in legend.get_texts()] == [
            *("config", "best", "PQ", "PQ of things")
        ]
        for panel in figure.axes:
            config, best, pq, things = panel.lines
            assert config.get_linewidth() > 3 * best.get_linewidth()
            assert np.array_equal(pq.get_ydata(), things.get_ydata())
            assert pq.get_linewidth() > 2 * things.get_linewidth()
            low, high = panel.get_xlim()
            assert low < min(pq.get_xdata()) and max(pq.get_xdata()) < high


class TestCommandLine:
    @pytest.fixture(scope="class")
    @staticmethod
    def arguments(trained: Path) -> list[str]:
        options = [*SMALL, "MODEL.WEIGHTS", trained / "model_final.pth"]
        return ["--config-file", CONFIG, *map(str, options)]

    @staticmethod
    def run(*arguments: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "tools/tune_merging.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )

    @pytest.mark.slow
    def test_finds_what_train_net_confirms(
        self, trained: Path, arguments: list[str], tmp_path: Path
    ):
        """Cut short and resumed, in two processes: PQ is train_net.py's, before and after."""
        output = tmp_path / "tuned"
        config, *options = arguments[:2], *arguments[2:]
        sweep = ["--output", output, "--score", "0.02,0.05,0.1", "--workers", "2"]
        first = self.run(*config, *sweep, "--limit", "2", *options)
        assert first.returncode == 0, first.stderr[-3000:]
        written = {p: p.stat().st_mtime_ns for p in output.glob("raw_outputs/*/*.npz")}
        assert len(written) == 2

        second = self.run(*config, *sweep, *options)
        assert second.returncode == 0, second.stderr[-3000:]
        assert "6/6" in second.stderr
        assert len(list(output.glob("raw_outputs/*/*.npz"))) == 6
        assert all(path.stat().st_mtime_ns == time for path, time in written.items())

        results = json.loads((output / "results.json").read_text())
        scores = json.loads((trained / "inference" / "metrics.json").read_text())
        for metric in METRICS:
            assert results["config"][metric] == scores[f"panoptic_seg/{metric}"]
        assert results["num_images"] == 6
        assert results["best"] in results["all"]
        assert results["best"]["PQ"] == max(entry["PQ"] for entry in results["all"])
        assert cv2.imread(str(output / "thresholds.png")) is not None

        lines = (output / "best.yaml").read_text()
        assert yaml.safe_load(lines) == yaml.safe_load(lines[lines.index("MODEL:") :])
        assert lines[lines.index("MODEL:") :] in second.stdout
        tuned = yaml.safe_load(lines)["MODEL"]["PANOPTIC_FPN"]["COMBINE"]
        best = [w for key, value in tuned.items() for w in (f"{PREFIX}.{key}", value)]
        run = train_net("--eval-only", *config, *options, *best, "OUTPUT_DIR", tmp_path / "eval")
        assert run.returncode == 0, run.stderr[-3000:]
        scores = json.loads((tmp_path / "eval" / "inference" / "metrics.json").read_text())
        for metric in METRICS:
            assert results["best"][metric] == scores[f"panoptic_seg/{metric}"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--score", "0.3,high"], "--score 0.3,high: expected numbers from 0 to 1"),
            (["--nms", "1.5"], "--nms 1.5: expected numbers from 0 to 1"),
            (["--overlap", "0.9,1"], "--overlap 1: instances that others hide wholly"),
            (["--stuff-area", "10,0.5"], "--stuff-area 10,0.5: expected numbers of pixels"),
            (["--nms", ""], "--nms : expected numbers"),
            (["--score", "0.001"], "SCORE_THRESH_TEST 0.01; lower that too"),
            (["--limit", "0"], "--limit 0: must be at least 1"),
            (["--workers", "-1"], "--workers -1: must be at least 1"),
        ],
    )
    def test_bad_values_are_one_line(
        self, arguments: list[str], options: list[str], message: str, tmp_path: Path, capsys
    ):
        output = tmp_path / "tuned"
        assert tool.main([*arguments[:2], "--output", str(output), *options, *arguments[2:]]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not output.exists()

    def test_raw_outputs_are_the_networks_not_those_of_merging(
        self, arguments: list[str], shapes: Path
    ):
        records = tool.panoptic_records("shapes_val")

        def name(*options: str) -> str:
            args = tool.parse([*arguments, *options])
            return tool.fingerprint(setup_prediction(args.config_file, args.opts), records)

        assert name() == name(f"{PREFIX}.OVERLAP_THRESH", "0.9", "OUTPUT_DIR", "elsewhere")
        others = [
            name("INPUT.MIN_SIZE_TEST", "32"),
            name("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.2"),
            name("MODEL.WEIGHTS", str(shapes / "recipe.json")),
        ]
        assert len({name(), *others}) == 4


PREFIX = "MODEL.PANOPTIC_FPN.COMBINE"
