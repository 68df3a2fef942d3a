"""tools/ablate.py, with a stand-in for train_net.py that takes milliseconds; its configs."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import pytest
from detectron2.modeling import build_model
from matplotlib.figure import Figure

from panoptic_fpn_ext.engine import setup

from ..conftest import CONFIG, REPOSITORY

ABLATIONS = Path("configs", "ablations")
CONFIGS = [
    path.relative_to(REPOSITORY)
    for path in sorted((REPOSITORY / ABLATIONS).glob("*/*.yaml"))
    if path.name != "experiments.yaml"
]

# Does what the options of its config say, and keeps a list of its calls.
TRAIN_NET = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
pairs = words[words.index("--config-file"):]
options = dict(zip(pairs[::2], pairs[1::2]))
output = pathlib.Path(options["OUTPUT_DIR"])
with open("calls.txt", "a") as file:
    file.write(json.dumps(words) + "\\n")
print("d2.utils.events INFO:  eta: 0:00:01  iter: 19  total_loss: 1.5")
does = options.get("DOES")
if does == "fail":
    print("Traceback (most recent call last):\\nRuntimeError: it broke", file=sys.stderr)
    sys.exit(1)
(output / "last_checkpoint").write_text("model_final.pth")
if does == "interrupt":
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if does != "forget":
    (output / "inference").mkdir(exist_ok=True)
    scores = {"panoptic_seg/PQ": float(options["PQ"]) + 2 * int(options["SEED"]), "segm/AP": None}
    (output / "inference" / "metrics.json").write_text(json.dumps(scores))
"""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background processes, tests too, ignore SIGINT from their start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    path = REPOSITORY / "tools" / "ablate.py"
    spec = importlib.util.spec_from_file_location("ablate", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablate", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two configs, to be compared in the current directory."""
    monkeypatch.chdir(tmp_path)
    folder = Path("family")
    folder.mkdir()
    Path("base.yaml").write_text("VERSION: 2\n")
    Path("train_net.py").write_text(TRAIN_NET)
    write(folder / "size_2.yaml", "PQ: 50")
    write(folder / "size_10.yaml", "PQ: 60")
    return folder


def write(path: Path, content: str) -> None:
    path.write_text(f"_BASE_: ../base.yaml\n{content}\n")


def calls() -> list[list[str]]:
    file = Path("calls.txt")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows(report: str) -> list[list[str]]:
    """The cells of all tables in a report."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def one_line(capsys: pytest.CaptureFixture) -> str:
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("ablate.py: error: ")
    assert not captured.out
    return line


class TestRuns:
    def test_table_plot_and_arguments(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        arguments = [str(family), "--seeds", "0", "1", "5", "--num-gpus", "2", "--output", "out"]
        assert tool.main([*arguments, "X.Y", "(1, 2)"], Path("train_net.py")) == 0
        report = capsys.readouterr().out
        spread = statistics.stdev([50, 52, 60])
        assert rows(report)[0] == ["config", "PQ", "mIoU", "mask AP", "box AP", "runs"]
        assert rows(report)[2:] == [
            ["size_2", f"54.0 ± {spread:.1f}", "–", "–", "–", "3 of 3"],
            ["size_10", f"64.0 ± {spread:.1f}", "–", "–", "–", "3 of 3"],
        ]
        assert Path("out", "results.md").read_text() in report
        assert cv2.imread("out/family.png") is not None
        assert len(calls()) == 6
        assert calls()[0] == [
            *("--resume", "--num-gpus", "2", "--config-file", "base.yaml", "PQ", "50"),
            *("X.Y", "(1, 2)", "SEED", "0", "OUTPUT_DIR", "out/size_2/seed_0"),
        ]

    def test_finished_runs_are_skipped_and_nothing_is_written(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        reports, trees = [], []
        for _ in range(2):
            assert tool.main([str(family), "--seeds", "0"], Path("train_net.py")) == 0
            reports.append(capsys.readouterr().out)
            trees.append(files(Path("output")))
        assert len(calls()) == 2
        assert reports[0] == reports[1]
        assert trees[0] == trees[1]

    def test_another_seed_trains_that_seed_only(self, tool: ModuleType, family: Path) -> None:
        for seeds in (["0"], ["0", "1"]):
            assert tool.main([str(family), "--seeds", *seeds], Path("train_net.py")) == 0
        assert len(calls()) == 4

    def test_a_failure_is_reported_and_the_others_go_on(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        write(family / "size_10.yaml", "DOES: fail\nPQ: 60")
        assert tool.main([str(family), "--seeds", "0", "1"], Path("train_net.py")) == 1
        captured = capsys.readouterr()
        assert [row[-1] for row in rows(captured.out)[2:]] == ["2 of 2", "0 of 2"]
        summary = captured.err.partition("2 of 4 runs failed:\n")[2].splitlines()
        log = "output/ablations/family/size_10/seed_0/unfinished.log"
        reason = "RuntimeError: it broke"
        assert summary[0] == f"  size_10, seed 0: {reason} (all it said: {log})"
        assert "Traceback" in Path(log).read_text()

        assert tool.main([str(family), "--seeds", "0", "1"], Path("train_net.py")) == 1
        assert len(calls()) == 4 + 2, "only what failed is tried again"
        write(family / "size_10.yaml", "PQ: 60")
        assert tool.main([str(family), "--seeds", "0", "1"], Path("train_net.py")) == 0
        assert not Path(log).exists()

    def test_a_run_without_scores_failed(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        write(family / "size_10.yaml", "DOES: forget")
        assert tool.main([str(family), "--seeds", "0"], Path("train_net.py")) == 1
        assert "wrote no inference/metrics.json" in capsys.readouterr().err

    def test_without_any_scores_there_is_no_plot(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        for name in ("size_2", "size_10"):
            write(family / f"{name}.yaml", "DOES: fail")
        assert (
            tool.main([str(family), "--seeds", "0", "--output", "out"], Path("train_net.py")) == 1
        )
        assert not list(Path("out").glob("*.png"))
        assert ".png" not in Path("out", "results.md").read_text()

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize("left", ["no scores", "scores of an evaluation during training"])
    def test_what_was_cut_off_is_resumed(self, tool: ModuleType, family: Path, left: str) -> None:
        arguments = [str(family), "--seeds", "0"]
        write(family / "size_10.yaml", "DOES: interrupt\nPQ: 1")
        assert tool.main(arguments, Path("train_net.py")) == 130
        folder = Path("output/ablations/family/size_10/seed_0")
        if left != "no scores":
            (folder / "inference").mkdir()
            (folder / "inference" / "metrics.json").write_text('{"panoptic_seg/PQ": 1.0}')
        before = calls()
        # The command stays the same; this time nobody interrupts it.
        Path("train_net.py").write_text(TRAIN_NET.replace('"interrupt"', '"nothing"'))
        assert tool.main(arguments, Path("train_net.py")) == 0
        assert calls()[len(before) :] == [before[-1]]
        assert before[-1][0] == "--resume"

    def test_a_run_of_another_command_is_not_taken_for_this_one(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        assert tool.main([str(family), "--seeds", "0"], Path("train_net.py")) == 0
        capsys.readouterr()
        write(family / "size_10.yaml", "PQ: 61")
        assert tool.main([str(family), "--seeds", "0"], Path("train_net.py")) == 2
        line = one_line(capsys)
        assert "output/ablations/family/size_10/seed_0 holds a run of another command" in line
        assert len(calls()) == 2

    def test_another_base(self, tool: ModuleType, family: Path) -> None:
        Path("coco.yaml").write_text("VERSION: 2\n")
        arguments = [str(family), "--base", "coco.yaml", "--quick"]
        assert tool.main(arguments, Path("train_net.py")) == 0
        assert len(calls()) == 2, "one seed"
        for call in calls():
            assert call[call.index("--config-file") + 1] == "coco.yaml"
            assert call[call.index("SOLVER.MAX_ITER") + 1] == "60"
        assert Path("output/ablations/family-coco-quick/results.md").is_file()

    def test_experiments_order_and_name_the_rows(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        write(family / "other.yaml", "PQ: 70")
        (family / "experiments.yaml").write_text(
            """
            experiments:
              size:
                title: By size
                question: Is larger better?
                axis: size
                columns: {panoptic_seg/PQ: quality}
                rows: {size_2: 2, size_10: 10}
              kind:
                title: By kind
                columns: {panoptic_seg/PQ: PQ}
                rows: {other: other, size_2: usual}
            """
        )
        assert tool.main([str(family), "--seeds", "0"], Path("train_net.py")) == 0
        report = capsys.readouterr().out
        found = [row for row in rows(report) if not row[0].startswith(":")]
        assert found == [
            ["size", "quality", "runs"],
            ["2", "50.0", "1 of 1"],
            ["10", "60.0", "1 of 1"],
            ["config", "PQ", "runs"],
            ["other", "70.0", "1 of 1"],
            ["usual", "50.0", "1 of 1"],
        ]
        assert "Is larger better?" in report
        assert len(calls()) == 3, "a config of two experiments is trained once"
        for name in ("size", "kind"):
            assert cv2.imread(f"output/ablations/family/{name}.png") is not None

    def test_shapes_are_made_where_they_are_trained_on_and_missing(
        self, tool: ModuleType, family: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DETECTRON2_DATASETS", "data")
        script = Path("make.py")
        script.write_text("open('made.txt', 'a').write('x')")
        monkeypatch.setattr(tool, "MAKE_SHAPES", script)
        for base, made in (("VERSION: 2", False), ('DATASETS: {TRAIN: ("shapes_train",)}', True)):
            Path("base.yaml").write_text(base)
            assert tool.main([str(family), "--seeds", "0"], Path("train_net.py")) == 0
            assert Path("made.txt").exists() == made


class TestPlots:
    """Of made-up scores."""

    @staticmethod
    def plot(tool: ModuleType, **scores: list[dict]) -> Figure | None:
        experiment = tool.Experiment(
            "size",
            "A title that is too long for a single panel, and so has to be broken",
            columns={"PQ": "PQ", "AP": "mask AP", "mIoU": "mIoU"},
            rows={"small": "2", "large": "10"},
        )
        return tool.plot(experiment, scores)

    def test_only_scores_that_there_are_have_a_panel(self, tool: ModuleType) -> None:
        figure = self.plot(tool, small=[{"PQ": 40.0, "AP": None}], large=[{"mIoU": 9.0}])
        assert [panel.get_title() for panel in figure.axes] == ["PQ", "mIoU"]

    def test_without_scores_there_is_none(self, tool: ModuleType) -> None:
        assert self.plot(tool, small=[{"AP": None}], large=[]) is None

    def test_the_only_run_is_there_once(self, tool: ModuleType) -> None:
        figure = self.plot(tool, small=[{"PQ": 40.0}], large=[{"PQ": 50.0}, {"PQ": 52.0}])
        (panel,) = figure.axes
        points = [point for line in panel.lines for point in zip(*line.get_data(), strict=True)]
        assert [point for point in points if point[0] < 0.5] == [(0, 40.0)]
        spread = 2**0.5
        assert sorted(y for x, y in points if x > 0.5) == pytest.approx(
            [51 - spread, 50, 51, 52, 51 + spread]
        )

    def test_title_and_legend_lie_within_and_overlap_nothing(self, tool: ModuleType) -> None:
        figure = self.plot(tool, small=[{"PQ": 40.0}], large=[{"PQ": 50.0}, {"PQ": 52.0}])
        figure.draw_without_rendering()
        (panel,), (legend,) = figure.axes, figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            *("the only run", "mean ± standard deviation", "a run")
        ]
        title = figure._suptitle.get_window_extent()
        boxes = [panel.get_tightbbox(), legend.get_window_extent(), title]
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        for box in boxes:
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width


class TestMistakes:
    def test_no_such_folder(self, tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
        assert tool.main(["nowhere"]) == 2
        assert "nowhere: no such folder" in one_line(capsys)

    def test_no_configs(
        self, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "experiments.yaml").write_text("experiments: {}")
        assert tool.main([str(tmp_path)]) == 2
        assert "holds no config" in one_line(capsys)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("experiments: [", "while parsing"),
            ("- a", "expected KEY: VALUE"),
            ("tables: {}", "expected `experiments`"),
            ("experiments: [a]", "`experiments` should map names"),
            (
                "experiments: {a: {title: A, columns: {x: y}, rows: {size_2: 1, size_10: 2}}}\n"
                "iterations: {size_2: 1.5}",
                "iterations: size_2: expected 1, 2, ..., got 1.5",
            ),
            ("experiments: {a: {rows: {}}}", "a: expected `title`"),
            ("experiments: {a: {title: A, rows: {size_2: 1}}}", "a: `columns` should map"),
            ("experiments: {a: {title: A, columns: {x: y}, rows: [x]}}", "a: `rows` should map"),
            (
                "experiments: {a: {title: A, columns: {x: y}, rows: {siz: 1}}}",
                "siz is no config of this folder (size_2, size_10)",
            ),
            (
                "experiments: {a: {title: A, columns: {x: y}, rows: {size_2: 1}}}",
                "the config size_10 is in the rows of no experiment",
            ),
        ],
    )
    def test_faulty_experiments(
        self,
        tool: ModuleType,
        family: Path,
        capsys: pytest.CaptureFixture,
        content: str,
        message: str,
    ) -> None:
        (family / "experiments.yaml").write_text(content)
        assert tool.main([str(family)], Path("train_net.py")) == 2
        line = one_line(capsys)
        assert "family/experiments.yaml: " in line
        assert message in line
        assert not Path("output").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["SOLVER.MAX_ITER"], "pairs KEY VALUE, got: SOLVER.MAX_ITER"),
            (["SEED", "3"], "use --seeds"),
            (["OUTPUT_DIR", "x"], "use --output"),
            (["--base", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ],
    )
    def test_faulty_arguments(
        self,
        tool: ModuleType,
        family: Path,
        capsys: pytest.CaptureFixture,
        arguments: list[str],
        message: str,
    ) -> None:
        assert tool.main([str(family), *arguments], Path("train_net.py")) == 2
        assert message in one_line(capsys)
        assert not Path("output").exists()

    def test_a_config_without_base(
        self, tool: ModuleType, family: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (family / "size_10.yaml").write_text("PQ: 1")
        assert tool.main([str(family)], Path("train_net.py")) == 2
        assert "family/size_10.yaml has no _BASE_" in one_line(capsys)


class TestShipped:
    """The families under configs/ablations."""

    @pytest.fixture(autouse=True)
    def _in_repository(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(REPOSITORY)

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
    def test_config_loads_and_builds_and_is_the_same_over_its_base_by_name(
        self, tool: ModuleType, shapes: Path, path: Path
    ) -> None:
        def load(config_file: Path | str, opts: list[str]) -> object:
            return setup(
                argparse.Namespace(
                    config_file=str(config_file), opts=opts, eval_only=False, resume=False
                )
            )

        cfg = load(path, [])
        build_model(cfg)
        family = tool.read_family(path.parent, Path(CONFIG))
        assert load(CONFIG, family.configs[path.stem].options) == cfg

    def test_families_are_whole(self, tool: ModuleType) -> None:
        families = [tool.read_family(folder) for folder in sorted(ABLATIONS.iterdir())]
        assert sum(len(family.configs) for family in families) == len(CONFIGS)

    def test_alternating_training_takes_twice_the_iterations_of_the_base(
        self, tool: ModuleType, shapes: Path, tmp_path: Path
    ) -> None:
        args = tool.parse([str(ABLATIONS / "panoptic"), "--output", str(tmp_path), "--seeds", "0"])
        runs = {run.config: run for run in tool.plan(tool.read_family(args.folder), args)}
        joint, alternate = (
            setup(
                argparse.Namespace(
                    config_file=CONFIG, opts=list(run.arguments[2:]), eval_only=False, resume=False
                )
            ).SOLVER
            for run in (runs["one_network"], runs["alternate"])
        )
        assert alternate.MAX_ITER == 2 * joint.MAX_ITER
        assert tuple(2 * step for step in joint.STEPS) == alternate.STEPS

    def test_weights_of_two_networks_go_where_there_are_two(self, tool: ModuleType) -> None:
        weights = ["MODEL.TWO_NETWORK.INSTANCE_WEIGHTS", "a.pkl", "MODEL.FPN.NORM", "GN"]
        family = tool.read_family(ABLATIONS / "panoptic", None)
        for name, config in family.configs.items():
            expected = weights if name == "two_networks" else weights[2:]
            assert tool._meant_for(config, weights) == expected
