#!/usr/bin/env python
"""Train a family of configs, each with several seeds, and compare their scores.

    python tools/ablate.py configs/ablations/semantic                      # on Shapes
    python tools/ablate.py configs/ablations/semantic --quick              # minutes: does it run?
    python tools/ablate.py configs/ablations/semantic --base ANOTHER.yaml --num-gpus 8

Every run is an ordinary `train_net.py --resume`, in a folder of its own. Run again, the same
command skips what is finished and goes on with what was cut off or failed; once all is finished it
only prints. A folder's configs hold what differs from their _BASE_; --base puts another config in
its place. What is compared with what, and in which scores, is in the folder's experiments.yaml;
without one, all configs are compared in the usual scores.

Exit status: 0 all runs are finished, 1 some failed, 2 nothing was run because of a mistake.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import setup

REPOSITORY = Path(__file__).parents[1]
TRAIN_NET = REPOSITORY / "train_net.py"
MAKE_SHAPES = REPOSITORY / "datasets" / "make_shapes.py"

EXPERIMENTS = "experiments.yaml"
SEEDS = (0, 1, 2)
QUICK_SEEDS = (0,)
QUICK = ("SOLVER.MAX_ITER", "60", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "10")
PROGRESS = re.compile(r"eta: \S+ +iter: \d+|Inference done \d+/\d+")  # in Detectron2's log
USUAL_SCORES = {
    "panoptic_seg/PQ": "PQ",
    "sem_seg/mIoU": "mIoU",
    "segm/AP": "mask AP",
    "bbox/AP": "box AP",
}


@dataclass(frozen=True)
class Config:
    """A config as train_net.py gets it: that of the base, and options KEY VALUE."""

    base: Path
    options: list[str]


@dataclass(frozen=True)
class Experiment:
    """A table and a plot: some configs of a family, compared in some scores."""

    name: str
    title: str
    question: str = ""
    axis: str = "config"  # what the rows differ in
    columns: dict[str, str] = field(default_factory=lambda: dict(USUAL_SCORES))  # score: heading
    rows: dict[str, str] = field(default_factory=dict)  # config: label


@dataclass(frozen=True)
class Family:
    """The configs of a folder, by name, and what is to be learnt from them."""

    folder: Path
    configs: dict[str, Config]
    experiments: list[Experiment]
    iterations: dict[str, int]  # config: how many times the base's it trains, where not once


@dataclass(frozen=True)
class Run:
    """A config with a seed, and the folder it writes to."""

    config: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of train_net.py, but for those that do not change the result

    @property
    def name(self) -> str:
        return f"{self.config}, seed {self.seed}"

    @property
    def command(self) -> str:
        return f"train_net.py {shlex.join(self.arguments)}\n"

    @property
    def log(self) -> Path:
        """All that train_net.py said; there until the run is finished."""
        return self.folder / "unfinished.log"

    @property
    def record(self) -> Path:
        """The command that the folder's content comes from."""
        return self.folder / "command.txt"

    def has_checkpoint(self) -> bool:
        return (self.folder / "last_checkpoint").exists()

    def scores(self) -> dict[str, float | None] | None:
        """Those of ``inference/metrics.json``; None if the run is not finished."""
        try:
            scores = json.loads((self.folder / "inference" / "metrics.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        # With TEST.EVAL_PERIOD there are scores before the end.
        return None if self.log.exists() else scores


def main(arguments: list[str] | None = None, train_net: Path = TRAIN_NET) -> int:
    """Run the command line; the exit status. ``train_net`` is the script that trains."""
    args = parse(arguments)
    try:
        family = read_family(args.folder, args.base)
        make_shapes_if_missing(family)
        runs = plan(family, args)
    except UserError as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        return 2

    todo = [run for run in runs if run.scores() is None]
    failures: dict[str, str] = {}
    try:
        done = len(runs) - len(todo)
        with tqdm(total=len(runs), initial=done, unit="run", disable=not todo) as bar:
            for run in todo:
                bar.set_postfix_str(run.name)
                if reason := train(run, train_net, args.num_gpus, bar):
                    failures[run.name] = f"{reason} (all it said: {run.log})"
                    bar.write(f"failed: {run.name}: {reason}", file=sys.stderr)
                bar.update()
    except KeyboardInterrupt:
        print("\nablate.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130

    print(f"\n{write_report(family, runs, args)}")
    print(f"Tables and plots: {args.output}")
    if failures:
        print(f"\n{len(failures)} of {len(runs)} runs failed:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the configs to compare")
    parser.add_argument(
        "--quick", action="store_true", help=f"{shlex.join(QUICK)} and seed 0, to see it run"
    )
    parser.add_argument("--base", type=Path, help="the config to take for _BASE_")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}"
    )
    parser.add_argument(
        "--output", type=Path, help="default: output/ablations/ and the names of folder and base"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="of each run")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="for every run; after --seeds, put -- before"
    )
    args = parser.parse_intermixed_args(arguments)
    args.seeds = tuple(dict.fromkeys(args.seeds or (QUICK_SEEDS if args.quick else SEEDS)))
    if args.output is None:
        name = [args.folder.resolve().name, args.base and args.base.stem, args.quick and "quick"]
        args.output = Path("output", "ablations", "-".join(part for part in name if part))
    return args


# What to run


def read_family(folder: Path, base: Path | None = None) -> Family:
    """The configs of ``folder``, over ``base`` or each over its own ``_BASE_``.

    Raises:
        UserError: there are none, or one of the files does not say what it should.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold the configs to compare")
    paths = {path.stem: path for path in folder.glob("*.yaml") if path.name != EXPERIMENTS}
    if not paths:
        raise UserError(f"{folder} holds no config (*.yaml)")
    names = sorted(paths, key=lambda name: re.sub(r"\d+", lambda n: n[0].zfill(9), name))
    configs = {name: _read_config(paths[name], base) for name in names}

    file = folder / EXPERIMENTS
    if not file.exists():
        everything = Experiment(folder.name, folder.name, rows={name: name for name in names})
        return Family(folder, configs, [everything], {})
    content = _read_mapping(file)
    for key in ("experiments", "iterations"):
        if not isinstance(content.setdefault(key, {}), dict):
            raise UserError(f"{file}: `{key}` should map names to what is said of them")
    if not content["experiments"] or len(content) > 2:
        raise UserError(f"{file}: expected `experiments`, and possibly `iterations`")
    experiments = [_experiment(file, *item) for item in content["experiments"].items()]
    rows = list(dict.fromkeys(name for experiment in experiments for name in experiment.rows))
    iterations = content["iterations"]
    for name in (*rows, *iterations):
        if name not in configs:
            raise UserError(f"{file}: {name} is no config of this folder ({', '.join(configs)})")
    for name, times in iterations.items():
        if not isinstance(times, int) or times < 1:
            raise UserError(f"{file}: iterations: {name}: expected 1, 2, ..., got {times!r}")
    for name in configs:
        if name not in rows:
            raise UserError(f"{file}: the config {name} is in the rows of no experiment")
    return Family(folder, {name: configs[name] for name in rows}, experiments, iterations)


def _read_config(path: Path, base: Path | None) -> Config:
    keys = _read_mapping(path)
    own_base = keys.pop("_BASE_", None)
    if base is None and own_base is None:
        raise UserError(f"{path} has no _BASE_: add it, or name one with --base")
    base = Path(os.path.normpath(base or path.parent / own_base))
    if not base.is_file():
        raise UserError(f"{base}: no such file, but it should be the base of {path}")
    return Config(base, _options(keys))


def _options(keys: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys of a config file as KEY VALUE."""
    options = []
    for key, value in keys.items():
        nested = isinstance(value, dict)
        options += _options(value, f"{prefix}{key}.") if nested else [prefix + key, str(value)]
    return options


def _experiment(file: Path, name: str, content: Any) -> Experiment:
    known = {"title", "question", "axis", "columns", "rows"}
    if not isinstance(content, dict) or set(content) - known or not content.get("title"):
        raise UserError(f"{file}: {name}: expected `title` and others of {sorted(known)}")
    for key in ("columns", "rows"):
        if not isinstance(content.get(key), dict) or not content[key]:
            raise UserError(f"{file}: {name}: `{key}` should map names to what the table says")
    rows = {config: str(label) for config, label in content["rows"].items()}
    return Experiment(name, **{**content, "rows": rows})


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected KEY: VALUE lines")
    return content


def make_shapes_if_missing(family: Family) -> None:
    """Make the dataset that the configs train on by default, so that they run anywhere."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes")
    bases = {config.base for config in family.configs.values()}
    needed = any("shapes_train" in base.read_text(encoding="utf-8") for base in bases)
    if not needed or (root / "annotations" / "panoptic_val.json").exists():  # written last
        return
    if subprocess.run([sys.executable, MAKE_SHAPES]).returncode:
        raise UserError(f"{root} could not be made: see above")


def plan(family: Family, args: argparse.Namespace) -> list[Run]:
    """Every config with every seed; seed by seed, so that a first table is soon there.

    Raises:
        UserError: a bad option, or a run's folder holds a run of another command.
    """
    if len(args.opts) % 2:
        raise UserError(f"options come as pairs KEY VALUE, got: {' '.join(args.opts)}")
    for key, option in (("SEED", "--seeds"), ("OUTPUT_DIR", "--output")):
        if key in args.opts[::2]:
            raise UserError(f"{key} differs from run to run: use {option}")
    arguments = {}
    for name, config in family.configs.items():
        options = [*config.options, *(QUICK if args.quick else ()), *_meant_for(config, args.opts)]
        options += _longer(config.base, options, family.iterations.get(name, 1))
        arguments[name] = ("--config-file", str(config.base), *options)
    runs = [
        Run(
            config=name,
            seed=seed,
            folder=args.output / name / f"seed_{seed}",
            arguments=(*arguments[name], "SEED", str(seed)),
        )
        for seed in args.seeds
        for name in family.configs
    ]
    for run in runs:
        if run.has_checkpoint() and run.record.read_text() != run.command:
            raise UserError(
                f"{run.folder} holds a run of another command (see its {run.record.name}): remove "
                "it, or name another --output"
            )
    return runs


def _meant_for(config: Config, opts: list[str]) -> list[str]:
    """Options for every run, the weights of two networks only where there are two."""
    if "TwoNetworkPanopticFPN" in config.options:
        return opts
    pairs = zip(opts[::2], opts[1::2], strict=True)
    return [item for pair in pairs if not pair[0].startswith("MODEL.TWO_NETWORK.") for item in pair]


def _longer(base: Path, options: list[str], times: int) -> list[str]:
    """What to add to ``options`` to train ``times`` as long."""
    if times == 1:
        return []
    args = argparse.Namespace(config_file=str(base), opts=options, eval_only=False, resume=True)
    solver = setup(args).SOLVER
    steps = tuple(step * times for step in solver.STEPS)
    return ["SOLVER.MAX_ITER", str(solver.MAX_ITER * times), "SOLVER.STEPS", str(steps)]


# Running it


def train(run: Run, train_net: Path, num_gpus: int, bar: tqdm) -> str | None:
    """Train and evaluate; None, or why that failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.record.write_text(run.command)
    command = [sys.executable, train_net, "--resume", "--num-gpus", str(num_gpus), *run.arguments]
    command += ["OUTPUT_DIR", run.folder]
    last = ""
    with (
        run.log.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout:
                log.write(line)
                last = line.strip() or last
                if found := PROGRESS.search(line):
                    bar.set_postfix_str(f"{run.name}: {' '.join(found[0].split())}")
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        return last or f"status {process.returncode}"
    run.log.unlink()
    if run.scores() is None:
        run.log.touch()
        return "it ended well, but wrote no inference/metrics.json"
    return None


# What came out


def write_report(family: Family, runs: list[Run], args: argparse.Namespace) -> str:
    """Write tables and plots, where they are not there yet; the tables, in Markdown."""
    scores = {name: [] for name in family.configs}
    for run in runs:
        if (found := run.scores()) is not None:
            scores[run.config].append(found)
    bases = sorted({f"`{config.base}`" for config in family.configs.values()})
    options = [*(QUICK if args.quick else ()), *args.opts]
    options = dict(zip(options[::2], options[1::2], strict=True))  # the last of a key counts
    parts = [
        f"# {family.folder.resolve().name}",
        f"Base: {', '.join([*bases, *(f'`{key} {value}`' for key, value in options.items())])}. "
        f"Seeds: {', '.join(map(str, args.seeds))}. Each score: mean ± standard deviation.",
    ]
    plots = {experiment.name: plot(experiment, scores) for experiment in family.experiments}
    for experiment in family.experiments:
        parts += [
            f"## {experiment.title}",
            *([experiment.question] if experiment.question else []),
            table(experiment, scores, len(args.seeds)),
            *([f"![{experiment.title}]({experiment.name}.png)"] if plots[experiment.name] else []),
        ]
    report = "\n\n".join(parts) + "\n"

    file = args.output / "results.md"
    is_new = not file.exists() or file.read_text(encoding="utf-8") != report
    for name, figure in plots.items():
        picture = args.output / f"{name}.png"
        if figure and (is_new or not picture.exists()):
            figure.savefig(picture, dpi=120)
    if is_new:
        file.write_text(report, encoding="utf-8")
    return report


def table(experiment: Experiment, scores: dict[str, list[dict]], num_seeds: int) -> str:
    """Mean and spread of each row's scores over its finished runs."""
    rows = [
        [
            label,
            *(summary(_values(scores[config], key)) for key in experiment.columns),
            f"{len(scores[config])} of {num_seeds}",
        ]
        for config, label in experiment.rows.items()
    ]
    headers = [experiment.axis, *experiment.columns.values(), "runs"]
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def summary(values: list[float]) -> str:
    """Mean ± sample standard deviation, as far as there are values for them."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def plot(experiment: Experiment, scores: dict[str, list[dict]]) -> Figure | None:
    """Each score that there is in a panel of its own: mean and spread, the runs beside them.

    None if there are no scores.
    """
    found = {
        key: [_values(scores[config], key) for config in experiment.rows]
        for key in experiment.columns
    }
    found = {key: rows for key, rows in found.items() if any(rows)}
    if not found:
        return None
    figure = Figure(figsize=(max(5, 1 + 2.8 * len(found)), 3.6), layout="constrained")
    figure.suptitle(experiment.title, fontsize="medium", wrap=True)
    handles = {}
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (key, rows) in zip(panels, found.items(), strict=True):
        for x, values in enumerate(rows):
            if len(values) > 1:
                spread = statistics.stdev(values)
                handles["mean ± standard deviation"] = panel.errorbar(
                    x, statistics.mean(values), spread, fmt="o", capsize=4, color="C0"
                )
                (handles["a run"],) = panel.plot(
                    [x + 0.15] * len(values), values, ".", color="C7", markersize=5
                )
            elif values:
                (handles["the only run"],) = panel.plot(
                    x, *values, "o", color="C0", markerfacecolor="white"
                )
        panel.set_title(experiment.columns[key], fontsize="small")
        panel.set_xlim(-0.5, len(experiment.rows) - 0.5)
        labels = list(experiment.rows.values())
        slanted = {"rotation": 30, "ha": "right"} if max(map(len, labels)) > 6 else {}
        panel.set_xticks(range(len(labels)), labels, fontsize="small", **slanted)
        panel.set_xlabel(experiment.axis, fontsize="small")
        panel.grid(axis="y", alpha=0.3)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        fontsize="small",
        frameon=False,
    )
    return figure


def _values(scores: list[dict], key: str) -> list[float]:
    return [score[key] for score in scores if score.get(key) is not None]


if __name__ == "__main__":
    sys.exit(main())
