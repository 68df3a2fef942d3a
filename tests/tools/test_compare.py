"""tools/compare.py: differences and their intervals, against a loop."""

import importlib.util
import json

import numpy as np
import pytest

from panoptic_fpn_ext.evaluation.analysis import mean_pq, totals_of
from panoptic_fpn_ext.evaluation.bootstrap import resamples
from panoptic_fpn_ext.evaluation.panoptic_matching import CategoryMatches

from ..conftest import REPOSITORY

spec = importlib.util.spec_from_file_location("compare", REPOSITORY / "tools" / "compare.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
CATEGORIES = [(True, 0), (False, 1)]


def run(matches: list[dict], config: dict[str, str]) -> dict:
    """What report.json has of a run."""
    return {
        "dataset": "data",
        "analysis": {"classes": [{"name": "cat"}, {"name": "sky"}]},
        "categories": [list(category) for category in CATEGORIES],
        "config": [[key, value, ""] for key, value in config.items()],
        "image_counts": [
            [
                f"{k}.jpg",
                [
                    [CATEGORIES.index(c), sum(m.ious), *map(float, _numbers(m))]
                    for c, m in image.items()
                ],
            ]
            for k, image in enumerate(matches)
        ],
    }


def _numbers(matches: CategoryMatches) -> tuple[int, int, int]:
    return len(matches.ious), matches.false_positives, matches.false_negatives


def images(rng: np.random.Generator, quality: float, number: int = 12) -> list[dict]:
    return [
        {
            category: CategoryMatches([quality - rng.random() / 5], int(rng.integers(2)), 0)
            for category in CATEGORIES
        }
        for _ in range(number)
    ]


@pytest.fixture
def runs() -> tuple[list[dict], list[dict]]:
    rng = np.random.default_rng(0)
    a, b = images(rng, 0.8), images(rng, 0.8)
    for image, better in zip(a, b, strict=True):  # stuff is better in each image
        ious = [image[False, 1].ious[0] + 0.15]
        better[False, 1] = CategoryMatches(ious, image[False, 1].false_positives, 0)
    return a, b


def test_differences_are_those_of_a_loop(runs, tmp_path, capsys):
    configs = {"SEED": "1", "SOLVER.MAX_ITER": "9"}, {"SEED": "2", "SOLVER.MAX_ITER": "9"}
    for name, matches, config in zip("ab", runs, configs, strict=True):
        (tmp_path / name / "inference").mkdir(parents=True)
        path = tmp_path / name / "inference" / "report.json"
        path.write_text(json.dumps(run(matches, config)))
    output = tmp_path / "difference.json"
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(output)]
    assert tool.main(arguments) == 0
    found = json.loads(output.read_text())
    assert found["images"] == 12 and found["config"] == {"SEED": ["1", "2"]}
    values = []
    for row in np.concatenate([np.ones((1, 12)), resamples(12)]):
        pq = [
            mean_pq(
                totals_of(
                    [i for i, n in zip(matches, row, strict=True) for _ in range(int(n))],
                    CATEGORIES,
                )
            )
            for matches in runs
        ]
        values.append([pq[1][key] - pq[0][key] for key in ("PQ", "PQ_th", "PQ_st")])
    low, high = np.percentile(values[1:], [2.5, 97.5], axis=0)
    for k, key in enumerate(("PQ", "PQ_th", "PQ_st")):
        score = found["scores"][key]
        assert score["difference"] == pytest.approx(values[0][k])
        assert (score["low"], score["high"]) == pytest.approx((low[k], high[k]))
        assert score["sure"] == (low[k] > 0 or high[k] < 0)
    assert found["scores"]["sky"] == found["scores"]["PQ_st"] and found["scores"]["sky"]["sure"]
    assert not found["scores"]["PQ_th"]["sure"]

    growth = {
        f"{k}.jpg": b[CATEGORIES[1]].pq - a[CATEGORIES[1]].pq
        for k, (a, b) in enumerate(zip(*runs, strict=True))
    }
    assert found["images_of_classes"]["sky"] == sorted(growth, key=growth.get, reverse=True)[:3]
    changes = [change["difference"] for change in found["changes"]]
    assert len(changes) == 12 and changes == sorted(changes)
    printed = capsys.readouterr().out
    assert "12 images" in printed and "| SEED" in printed and "SOLVER.MAX_ITER" not in printed


def test_images_of_one_run_alone_are_left_out_and_told(runs, capsys):
    a, b = run(runs[0], {}), run(runs[1][:9], {})
    result = tool.compare(a, b)
    assert result["images"] == 9 and result["left_out"] == [3, 0]
    same = tool.compare(run(runs[0][:9], {}), b)
    assert result["scores"] == same["scores"]
    assert "images of one run alone: A 3, B 0" in tool.text(result)


def test_mistakes_are_named(runs, tmp_path, capsys):
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    good.write_text(json.dumps(run(runs[0], {})))
    content = run(runs[0], {})
    content["analysis"]["classes"][0]["name"] = "dog"
    other.write_text(json.dumps(content))
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    for path, message in (
        (tmp_path / "none", "No such file or directory; evaluate with TEST.REPORT True"),
        (nothing, "not a report.json"),
        (other, "other classes"),
    ):
        assert tool.main([str(good), str(path)]) == 2
        assert message in capsys.readouterr().err
