"""tools/plot_metrics.py: which curves there are, and of what."""

import importlib.util
import json

from PIL import Image

from ..conftest import REPOSITORY

spec = importlib.util.spec_from_file_location(
    "plot_metrics", REPOSITORY / "tools" / "plot_metrics.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_a_curve_of_each_run_in_a_panel_of_each_key(tmp_path):
    for name, shift in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        lines = [{"iteration": k, "total_loss": 9 - k + shift} for k in range(5)]
        lines.append({"iteration": 5, "panoptic_seg/PQ": 50.0 + shift})
        text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 6, "tot'  # killed while writing
        (tmp_path / name / "metrics.json").write_text(text)
    runs = {name: tool.read(tmp_path / name) for name in "ab"}
    loss, pq = tool.draw(runs, ["total_loss", "loss_mask", "panoptic_seg/PQ"]).axes
    assert [panel.get_title() for panel in (loss, pq)] == ["total_loss", "panoptic_seg/PQ"]
    assert [list(line.get_ydata()) for line in loss.lines] == [[9, 8, 7, 6, 5], [10, 9, 8, 7, 6]]
    assert [line.get_label() for line in pq.lines] == ["a", "b"]
    assert [line.get_xydata().tolist() for line in pq.lines] == [[[5, 50]], [[5, 51]]]
    output = tmp_path / "curves.png"
    assert tool.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(output)]) == 0
    assert Image.open(output).size == (880, 320)


def test_mistakes_are_named(tmp_path, capsys):
    arguments = [str(tmp_path), "--output", str(tmp_path / "curves.png")]
    assert tool.main(arguments) == 2
    assert "metrics.json: No such file or directory" in capsys.readouterr().err
    path = tmp_path / "metrics.json"
    for content, message in (
        ("{}", "no line with an iteration"),
        ('{"a\n{"iteration": 1}', "line 1 is no JSON"),
        ('{"iteration": 1, "loss": 2}', "no run has any of them, but iteration, loss"),
    ):
        path.write_text(content)
        assert tool.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()
