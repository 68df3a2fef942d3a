"""docs/DATASETS.md, "your own dataset in five minutes", run as a reader would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY

pytestmark = pytest.mark.slow

SHORT = (
    "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN '(64,)' INPUT.MIN_SIZE_TEST 64"
)


def blocks() -> list[tuple[str, str]]:
    """Language and content of the code blocks of the worked example."""
    page = (REPOSITORY / "docs" / "DATASETS.md").read_text()
    section = page.split("\n## ")[1]
    assert section.startswith("Your own dataset in five minutes")
    return re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL)


def bash(command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clone of the repository, as far as the example needs one."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train_net.py", "tools", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="module")
def outputs(folder) -> list[str]:
    """What the commands of the page print, training cut short."""
    outputs = []
    for language, content in blocks():
        if language != "bash":
            name = content.partition("\n")[0].removeprefix("# ")
            (folder / name).write_text(content)
            continue
        if "train_net.py" in content:
            content = f"{content.rstrip()} {SHORT}"
        run = bash(content, folder)
        assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-2000:]
        outputs.append(run.stdout)
    return outputs


def test_the_example_makes_checks_and_trains(folder, outputs):
    assert len(outputs) == 3
    assert "\n0 faults" in outputs[1]
    scores = json.loads((folder / "output" / "coins" / "inference" / "metrics.json").read_text())
    assert {"panoptic_seg/PQ", "sem_seg/mIoU", "panoptic_seg/PQ-penny"} <= scores.keys()


def test_the_readme_predicts_with_the_config_of_the_run(folder, outputs):
    readme = (REPOSITORY / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import cv2.*?)```", readme, flags=re.DOTALL)
    image = next((folder / "my" / "images").iterdir())
    for theirs, ours in {
        "output/quickstart": "output/coins",
        "datasets/shapes/val/000000000001.jpg": str(image),
        "shapes_val": "coins_val",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    (folder / "predict.py").write_text(code)
    run = bash("python predict.py", folder)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (folder / "prediction.png").stat().st_size


def test_a_wrong_class_count_is_the_line_on_the_page(folder, outputs):
    command = "python train_net.py --config-file my.yaml MODEL.SEM_SEG_HEAD.NUM_CLASSES 2"
    run = bash(command, folder)
    assert run.returncode == 2
    page = (REPOSITORY / "docs" / "DATASETS.md").read_text()
    assert run.stderr.strip().splitlines()[-1] in page


def test_a_checkpoint_of_other_classes_is_one_line(folder, outputs):
    categories = json.loads((folder / "my" / "val.json").read_text())
    categories["categories"].append({"id": 5, "name": "dime", "isthing": 1})
    (folder / "my" / "more.json").write_text(json.dumps(categories))
    config = (folder / "my.yaml").read_text().replace("my/train.json", "my/more.json")
    (folder / "more.yaml").write_text(config.replace("my/val.json", "my/more.json"))
    command = "python train_net.py --config-file more.yaml --eval-only MODEL.WEIGHTS"
    run = bash(f"{command} output/coins/model_final.pth OUTPUT_DIR output/more", folder)
    assert run.returncode == 2, run.stderr[-2000:]
    line = run.stderr.strip().splitlines()[-1]
    assert "config.yaml: trained on other classes than those of coins_val: number 4 is" in line
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_faulty_file_in_a_data_loader_process_is_one_line(folder, outputs, processes):
    for png in (folder / "my" / "panoptic").glob("?.png"):
        png.write_bytes(png.read_bytes()[:60])
    content = json.loads((folder / "my" / "train.json").read_text())
    for key in ("images", "annotations"):
        content[key] = content[key][:10]
    (folder / "my" / "broken.json").write_text(json.dumps(content))
    config = (folder / "my.yaml").read_text().replace("my/train.json", "my/broken.json")
    (folder / "broken.yaml").write_text(config)
    command = f"python train_net.py --config-file broken.yaml --num-gpus {processes}"
    options = "MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 1 OUTPUT_DIR output/broken"
    run = bash(f"{command} {options}", folder)
    assert run.returncode == 2, run.stderr[-2000:]
    line = run.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"train_net\.py: error: dataset coins_train: my/panoptic/\d\.png: "
        r"damaged or truncated PNG; .*",
        line,
    )
    assert "Traceback" not in run.stdout + run.stderr
