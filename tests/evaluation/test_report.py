"""report.html: what is in it, and how it behaves in a browser."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from panoptic_fpn_ext.evaluation import (
    InstanceAPEvaluator,
    PanopticQualityEvaluator,
    ReportWriter,
    SemSegIoUEvaluator,
    build_evaluator,
)
from panoptic_fpn_ext.evaluation.merging_losses import MergingThresholds
from panoptic_fpn_ext.modeling.merging import merge_panoptic

from ..browser import check_looks_and_requests, drawn, pressed, wait_for
from .conftest import in_parts
from .test_build import config


def written(
    folder: Path, records: list[dict], outputs: list[dict], *, dataset="shapes_val", **keys
):
    evaluator = build_evaluator(config(**keys), dataset, str(folder))
    evaluator.reset()
    evaluator.process(records, outputs)
    evaluator.evaluate()
    assert not evaluator.failures


MERGING = {
    **{"thing_sem_seg_ids": [0], "overlap_threshold": 0.5, "stuff_area_thresh": 300},
    "instances_score_thresh": 0.6,
}


def merged(output: dict) -> dict:
    """The outputs of an image, the panoptic map made of the two others."""
    merging = merge_panoptic(output["instances"], output["sem_seg"].argmax(0), **MERGING)
    return {**output, "panoptic_seg": merging}


@pytest.fixture
def report(shapes_predictions, tmp_path) -> Path:
    written(tmp_path, *shapes_predictions)
    return tmp_path / "report.html"


def test_the_page_is_one_file_with_all_in_it(report):
    page = report.read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert not re.findall(r"https?://", page.replace("http://www.w3.org/2000/svg", ""))
    assert len(page) < 3e6
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', page, re.DOTALL)[1])
    groups = json.loads(re.search(r'id="groups">(.*?)</script>', page, re.DOTALL)[1])
    assert len(pictures) == 6
    worst = [float(pictures[k]["caption"].split()[-1]) for k in groups[0]["images"]]
    assert worst == sorted(worst) and len(worst) == 6
    content = json.loads((report.parent / "report.json").read_text())
    assert content["analysis"]["images"] == len(content["image_counts"]) == 6
    assert {row["name"] for row in content["analysis"]["classes"]} >= {"disc", "sky"}
    assert [h["label"] for h in content["headlines"]] == [
        *("PQ", "PQ things", "PQ stuff", "mIoU", "mask AP", "box AP")
    ]


def test_what_merging_drops(shapes_predictions, tmp_path):
    records, outputs = shapes_predictions
    combine = "MODEL__PANOPTIC_FPN__COMBINE__"
    keys = {f"{combine}INSTANCES_CONFIDENCE_THRESH": 0.6, f"{combine}STUFF_AREA_LIMIT": 300}
    written(tmp_path / "all", records, [merged(output) for output in outputs], **keys)
    merging = json.loads((tmp_path / "all/report.json").read_text())["merging"]
    assert list(merging) == ["score", "overlap", "area"]
    score = merging["score"]
    assert score["missed"] and score["PQ_th"] > score["PQ"] > 0 == score["PQ_st"]
    assert "INSTANCES_CONFIDENCE_THRESH" in (tmp_path / "all/report.html").read_text("utf-8")

    written(tmp_path / "foreign", records, outputs, **keys)  # of which merging is not known
    assert json.loads((tmp_path / "foreign/report.json").read_text())["merging"] is None
    page = (tmp_path / "foreign/report.html").read_text("utf-8")
    assert "Merging" not in page


def test_names_cannot_break_the_page(
    shapes_predictions, shapes_without_json, tmp_path, monkeypatch
):
    metadata = MetadataCatalog.get(shapes_without_json)
    names = ["</script><b>", *metadata.thing_classes[1:]]
    monkeypatch.setitem(metadata.__dict__, "thing_classes", names)
    written(tmp_path, *shapes_predictions, dataset=shapes_without_json)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "</script><b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;" in page and "\\u003c/script>\\u003cb>" in page


def test_a_key_switches_it_off(shapes_predictions, tmp_path):
    written(tmp_path, *shapes_predictions, TEST__REPORT=False)
    assert not (tmp_path / "report.html").exists()


def test_several_processes_give_the_same(shapes_predictions, tmp_path, evaluate_in_processes):
    class All:
        """As :class:`IndependentEvaluators`, which the fixture would not know."""

        def __init__(self, folder: Path) -> None:
            parts = (PanopticQualityEvaluator, SemSegIoUEvaluator, InstanceAPEvaluator)
            self.parts = [part.from_dataset("shapes_val") for part in parts]
            self.parts.append(
                ReportWriter(
                    folder=folder,
                    dataset_name="shapes_val",
                    evaluators=self.parts[:3],
                    merging=MergingThresholds(score=0.6, stuff_area=300),
                )
            )

    records, outputs = shapes_predictions
    outputs = [merged(output) for output in outputs]
    facts = []
    for number in (1, 3):
        folder = tmp_path / str(number)
        evaluators = [All(folder) for _ in range(number)]
        parts = in_parts(np.random.default_rng(0), number, records, outputs)
        for place in range(4):
            column = iter([everything.parts[place] for everything in evaluators])
            evaluate_in_processes(lambda column=column: next(column), parts)
        content = json.loads((folder / "report.json").read_text())
        content.pop("run")
        page = (folder / "report.html").read_text("utf-8")
        facts.append((content, page[page.index('id="pictures"') :]))
    assert facts[0] == facts[1]
    assert facts[0][0]["merging"]["score"]["missed"]


def test_in_a_browser(report, browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    pixels, press, wait = (partial(f, browser) for f in (drawn, pressed, wait_for))
    browser.get(report.as_uri())
    wait("document.body.dataset.shown")
    assert browser.execute_script("return scrollY") == 0  # it opens at its top

    # Tables sort, by numbers as numbers, from the keyboard, too.
    button = browser.find_element(By.XPATH, "//thead//button[text()='PQ']")
    values = []
    for _ in range(2):
        button.send_keys(Keys.ENTER)
        cells = browser.execute_script(
            "return [...document.querySelector('table.sortable').tBodies[0].rows]"
            ".map(row => row.cells[3].textContent.trim())"
        )
        values.append([float(cell) for cell in cells if cell != "–"])
    assert values[0] == sorted(values[0], reverse=True) == values[1][::-1]
    assert len(set(values[0])) > 2

    # Overlays, errors and images by key.
    browser.execute_script("document.activeElement.blur()")
    overlaid, plain = pixels(1), pixels(0)
    assert overlaid != plain
    press("o")
    assert pixels(1) == plain
    press("o", "e")
    assert pixels(1) not in (plain, overlaid)
    press("e", "t")
    assert pixels(1) == pixels(2)
    press("t")
    assert pixels(1) == overlaid
    first = browser.find_element(By.ID, "caption").text
    press(Keys.ARROW_RIGHT)
    wait(f"document.getElementById('caption').textContent !== {json.dumps(first)}")
    press(Keys.ARROW_LEFT)
    wait(f"document.getElementById('caption').textContent === {json.dumps(first)}")

    # Segments are named.
    canvas = browser.find_elements(By.CSS_SELECTOR, "canvas")[2]
    ActionChains(browser).move_to_element(canvas).perform()
    told = browser.find_element(By.ID, "info").text
    assert re.fullmatch(r"truth: (void|[\w ]+ · [\w ]+ · IoU \d\.\d\d)", told)

    # Opacity, groups.
    browser.execute_script(
        "const e = document.getElementById('opacity'); e.value = 0;"
        "e.dispatchEvent(new Event('input'))"
    )
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "caption")).perform()
    assert pixels(2) == plain
    options = browser.find_elements(By.CSS_SELECTOR, "#group option")
    assert [o.text for o in options][:3] == [
        *("Worst 12 by PQ of the image", "Best 6 by PQ of the image", "Random 6")
    ]

    check_looks_and_requests(browser, report)
