"""The page of tools/compare.py: which images of two runs it shows, and what of them."""

import importlib.util
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.evaluation import report_maps
from panoptic_fpn_ext.evaluation.page_pictures import index_png, picture

from ..browser import check_looks_and_requests, drawn, pressed, wait_for
from ..conftest import REPOSITORY
from .test_report import written

spec = importlib.util.spec_from_file_location("compare", REPOSITORY / "tools" / "compare.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def perfect(record: dict) -> tuple[torch.Tensor, list[dict]]:
    ids = read_panoptic_png(record["pan_seg_file_name"])
    present = [s for s in record["segments_info"] if (ids == s["id"]).any()]
    return torch.from_numpy(ids), [
        {k: s[k] for k in ("id", "isthing", "category_id")} for s in present
    ]


def nothing(record: dict) -> tuple[torch.Tensor, list[dict]]:
    return torch.zeros(read_panoptic_png(record["pan_seg_file_name"]).shape, dtype=torch.int32), []


@pytest.fixture
def runs(shapes_predictions, tmp_path) -> tuple[Path, Path]:
    """Two runs: in B images 0 and 1 are perfect, and 2 is empty."""
    records, outputs = shapes_predictions
    theirs = [dict(output) for output in outputs]
    for k, change in enumerate((perfect, perfect, nothing)):
        theirs[k]["panoptic_seg"] = change(records[k])
    paths = tmp_path / "a<i>", tmp_path / "b"
    for path, run, seed in zip(paths, (outputs, theirs), (1, 2), strict=True):
        written(path / "inference", records, run, SEED=seed)
    return paths


@pytest.fixture
def page(runs, tmp_path) -> Path:
    output = tmp_path / "difference.html"
    assert tool.main([*map(str, runs), "--html", str(output)]) == 0
    return output


def content(page: Path, name: str):
    text = page.read_text("utf-8")
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', text, re.DOTALL)[1])


def test_the_most_changed_images_of_both_runs_beside_the_truth(runs, page, shapes_predictions):
    text = page.read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert ">SEED<" in text and "a<i>" not in text
    pictures, groups = content(page, "pictures"), content(page, "groups")
    names = [Path(record["file_name"]).name for record in shapes_predictions[0]]
    assert {g["title"] for g in groups} >= {
        f"Biggest {w} by PQ of the image" for w in ("gains", "losses")
    }
    by_group = [{pictures[k]["name"] for k in group["images"]} for group in groups]
    assert by_group[:2] == [set(names[:2]), {names[2]}]  # the others are the same
    by_name = {entry["name"]: entry for entry in pictures}
    for k, name in enumerate(names[:3]):
        entry = by_name[name]
        assert list(entry["maps"]) == ["A", "B", "truth"]
        kinds = {kind for _, kind, _ in entry["maps"]["truth"]["segments"]}
        assert kinds <= ({"gained", "match"} if k < 2 else {"lost", "missed"})
        a, b, change = map(float, re.findall(r"[+-]?\d+\.\d", entry["caption"]))
        assert b == (100 if k < 2 else 0) and change == pytest.approx(b - a, abs=0.11)
        # B is perfect: it has the truth's colours, which are A's where A matches.
        if k < 2:
            told = [
                {text.split(" ·")[0]: color for text, _, color in entry["maps"][m]["segments"]}
                for m in ("B", "truth")
            ]
            assert told[0] == told[1]
        elif k == 2:
            assert entry["maps"]["B"]["segments"] == []


def test_without_maps_or_files_there_are_numbers(runs, tmp_path, capsys, monkeypatch, caplog):
    arguments = [*map(str, runs), "--html", str(tmp_path / "page.html")]
    with monkeypatch.context() as patch:
        patch.setattr(
            "panoptic_fpn_ext.evaluation.page_pictures.read_ground_truth",
            lambda path: (_ for _ in ()).throw(tool.UserError(f"{path}: gone")),
        )
        assert tool.main(arguments) == 0
    assert "is not shown:" in caplog.text and "gone" in caplog.text
    assert content(tmp_path / "page.html", "pictures") == []
    (runs[1] / "inference" / "report_maps.zip").unlink()
    assert tool.main(arguments) == 0
    assert "report_maps.zip is not there" in capsys.readouterr().err
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "No pictures" in text and "<canvas" not in text and "PQ things" in text


def test_other_ground_truth_is_told(runs):
    with report_maps.kept_maps(runs[0] / "inference" / report_maps.NAME) as maps:
        a, metadata = maps["000000000001.jpg"], maps.metadata()
    names = {segment.category: "name" for segment in a.segments}
    fewer = replace(a, segments=a.segments[1:])
    other = replace(a, png=index_png(np.zeros((30, 64), int), []))
    for b, message in (
        (fewer, "of other true segments in B"),
        (other, "of another size than in B"),
    ):
        with pytest.raises(tool.UserError, match=message):
            picture({"A": a, "B": b}, names, metadata, "")
    assert list(picture({"A": a, "B": a}, names, metadata, "")["maps"]) == ["A", "B", "truth"]


def test_mistakes_are_named(runs, tmp_path, capsys):
    arguments = [*map(str, runs), "--html"]
    assert tool.main([*arguments, str(tmp_path / "none" / "page.html")]) == 2
    assert "page.html: cannot be written: No such file" in capsys.readouterr().err
    maps = runs[0] / "inference" / "report_maps.zip"
    whole = maps.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], whole[:60] + b"\0" * 600 + whole[660:]):
        maps.write_bytes(damaged)
        assert tool.main([*arguments, str(tmp_path / "page.html")]) == 2
        error = capsys.readouterr().err
        assert "report_maps.zip" in error and "evaluate again" in error


def test_maps_are_bounded(shapes_predictions, tmp_path, monkeypatch, caplog):
    written(tmp_path / "all", *shapes_predictions)
    with report_maps.kept_maps(tmp_path / "all" / report_maps.NAME) as maps:
        names = [
            image
            for image, _ in json.loads((tmp_path / "all/report.json").read_text())["image_counts"]
        ]
        assert all(name in maps for name in names) and "colors.json" not in maps
    monkeypatch.setattr(report_maps, "MOST_BYTES", 2000)
    written(tmp_path / "few", *shapes_predictions)
    with report_maps.kept_maps(tmp_path / "few" / report_maps.NAME) as maps:
        kept = [name in maps for name in names]
    assert kept[0] and not kept[-1]
    assert f"of {kept.count(False)} images it has no map" in caplog.text


def test_in_a_browser(page, browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    pixels, press, wait = (partial(f, browser) for f in (drawn, pressed, wait_for))
    browser.get(page.as_uri())
    wait("document.body.dataset.shown")
    a, b, truth = (pixels(k) for k in range(3))
    assert a != b == truth  # B is perfect
    press("f")
    assert (pixels(0), pixels(1), pixels(2)) == (b, a, truth)
    press("f", "t")
    assert pixels(0) == pixels(1) == truth
    press("t", "e")
    assert pixels(2) not in (a, b, truth)
    press("e", "o")
    assert pixels(0) == pixels(1) == pixels(2)
    press("o")
    assert [pixels(k) for k in range(3)] == [a, b, truth]

    # A row of the table shows its image, from the keyboard, too.
    button = browser.find_elements(By.CSS_SELECTOR, "[data-picture]")[-1]
    button.send_keys(Keys.ENTER)
    wait(f"document.getElementById('caption').textContent.startsWith({json.dumps(button.text)})")
    selected = browser.execute_script(
        "return document.getElementById('group').selectedOptions[0].text"
    )
    assert selected == "Biggest losses by PQ of the image"

    canvas = browser.find_elements(By.CSS_SELECTOR, "canvas")[2]
    ActionChains(browser).move_to_element(canvas).perform()
    told = browser.find_element(By.ID, "info").text
    assert re.fullmatch(r"truth: (void|[\w ]+ · found by [\w ]+ · IoU A \d\.\d\d, B 0\.00)", told)

    head = browser.find_element(By.XPATH, "//thead//button[text()='B - A']")
    head.send_keys(Keys.ENTER)
    values = browser.execute_script(
        "return [...document.querySelector('table.sortable').tBodies[0].rows]"
        ".map(row => row.cells[3].textContent.trim())"
    )
    numbers = [float(value) for value in values if value != "–"]
    assert numbers == sorted(numbers, reverse=True)
    check_looks_and_requests(browser, page)
