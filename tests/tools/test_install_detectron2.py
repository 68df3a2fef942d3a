"""tools/install_detectron2.py, on small made-up sdists and without a network.

pip is the real one, told to look in a local folder only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_detectron2.py"

# What the mends look for, in as few lines as make each of them count.
SOURCES = {
    "detectron2/__init__.py": "setup_environment = print\nsetup_environment()\n",
    "detectron2/data/transforms/transform.py": "interp=Image.LINEAR\n",
    "detectron2/engine/train_loop.py": (
        "from torch.cuda.amp import GradScaler\n"
        "from torch.cuda.amp import autocast\n"
        "with autocast():\n    pass\n"
    ),
    "detectron2/evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "class COCOEvaluator:\n"
        "    def __init__(self, use_fast_impl):\n"
        "        self._use_fast_impl = use_fast_impl\n"
    ),
    "detectron2/evaluation/fast_eval_api.py": "from detectron2 import _C\n",
    "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import TracingAdapter\n",
    "detectron2/layers/deform_conv.py": "from detectron2 import _C\n",
    "detectron2/layers/mask_ops.py": "mask = np.array(mask, copy=False)\n",
    "detectron2/layers/nms.py": (
        "def nms_rotated(*boxes):\n    return torch.ops.detectron2.nms_rotated(*boxes)\n"
    ),
    "detectron2/layers/rotated_boxes.py": (
        "from detectron2 import _C\ndef iou(*boxes):\n    return _C.box_iou_rotated(*boxes)\n"
    ),
    "detectron2/modeling/anchor_generator.py": "torch.meshgrid(shifts_y, shifts_x)\n",
    "detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "detectron2/model_zoo/configs/COCO/fpn.py": "lr = 0.02\n",
    "detectron2/model_zoo/model_zoo.py": (
        "import os\n"
        "import pkg_resources\n"
        "def get_config_file(config_path):\n"
        "    return pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n"
    ),
    "detectron2/projects/__init__.py": "",
    "detectron2/structures/masks.py": (
        "keep = np.zeros(3, dtype=np.bool), np.bool_, np.float32, np.int64\n"
        "a, b, c = np.int, np.float, np.str\n"
    ),
    "detectron2/utils/collect_env.py": 'subprocess.check_output("cc", shell=True)\n',
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/post_processing.py": (
        "y_coord, x_coord = torch.meshgrid(\n    height,\n    width,\n)\n"
    ),
    "projects/PointRend/point_rend/__init__.py": "",
    "LICENSE": "the licence\n",
    "setup.cfg": "",
    "setup.py": (
        'from setuptools import setup\nsetup(name="pb1-detectron2", version="0.6", packages=[])\n'
    ),
}
for package in ("data", "data/transforms", "engine", "evaluation", "layers", "modeling"):
    SOURCES[f"detectron2/{package}/__init__.py"] = ""
for package in ("structures", "utils"):
    SOURCES[f"detectron2/{package}/__init__.py"] = ""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, its site-packages a folder of the test's and no index in reach."""
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "install_detectron2", module)
    spec.loader.exec_module(module)
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr(module, "site_packages", lambda: site)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The made-up sources, unpacked."""
    folder = tmp_path / "pb1-detectron2-0.6"
    for name, text in SOURCES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """The made-up sources as an sdist in the folder where pip looks."""
    file = tmp_path / "index" / "pb1-detectron2-0.6.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        for name, text in SOURCES.items():
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return file


def fails_with(tool: ModuleType, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run the script, which must fail; its message, which must be one line."""
    assert tool.main(list(arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("install_detectron2: ")
    return line


def probed(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *answers: bool) -> None:
    """Let the script find, each time it looks, that Detectron2 works or not."""
    remaining = list(answers)

    def probe() -> tuple[bool, str]:
        return (True, "0.6 in here") if remaining.pop(0) else (False, "ImportError: it is broken")

    monkeypatch.setattr(tool, "probe", probe)


def recorded(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Let the environment's metadata name this version of Detectron2."""

    def of(package: str) -> str:
        if package == "detectron2" and version is None:
            raise tool.importlib.metadata.PackageNotFoundError
        return version if package == "detectron2" else "26.2.1"

    monkeypatch.setattr(tool.importlib.metadata, "version", of)


class TestMends:
    def test_every_mend_is_applied(self, tool: ModuleType, tree: Path) -> None:
        tool.mend(tree)
        mended = {
            file.relative_to(tree).as_posix(): file.read_text() for file in tree.rglob("*.py")
        }
        assert (
            "zeros(3, dtype=bool), np.bool_, np.float32, np.int64\na, b, c = int, float, str\n"
            in mended["detectron2/structures/masks.py"]
        )
        assert "Image.BILINEAR" in mended["detectron2/data/transforms/transform.py"]
        assert 'with autocast("cuda")' in mended["detectron2/engine/train_loop.py"]
        assert "np.asarray(mask)" in mended["detectron2/layers/mask_ops.py"]
        assert (
            '    width,\n        indexing="ij",\n)'
            in mended["detectron2/projects/panoptic_deeplab/post_processing.py"]
        )
        everything = "".join(mended.values())
        for gone in ("import _C", "pkg_resources", "torch.cuda.amp", "from .api", "COCOeval_opt\n"):
            assert gone not in everything
        for name, text in mended.items():
            compile(text, name, "exec")

    def test_changed_files_say_so_and_others_do_not(self, tool: ModuleType, tree: Path) -> None:
        tool.mend(tree)
        note = "# Changed for Detectron2 0.6+pure"
        assert (tree / "detectron2/layers/nms.py").read_text().startswith(note)
        assert (tree / "detectron2/projects/__init__.py").read_text() == ""

    def test_projects_move_into_the_package(self, tool: ModuleType, tree: Path) -> None:
        tool.mend(tree)
        for name in ("point_rend", "deeplab", "panoptic_deeplab"):
            assert (tree / "detectron2" / "projects" / name / "__init__.py").is_file()

    @pytest.mark.parametrize("lost", ["detectron2/layers/mask_ops.py", "detectron2/__init__.py"])
    def test_one_that_finds_nothing_stops_the_tool(
        self, tool: ModuleType, tree: Path, lost: str
    ) -> None:
        (tree / lost).write_text("")
        with pytest.raises(tool.InstallError, match=f"nothing to mend in {lost}"):
            tool.mend(tree)


class TestFromSdistToWheel:
    def test_the_wheel_works(
        self,
        tool: ModuleType,
        sdist: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        """The wheel is kept where it was asked for, and what is in it can be imported."""
        monkeypatch.setattr(tool, "SDIST_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
        recorded(tool, monkeypatch, tool.VERSION)
        probed(tool, monkeypatch, True)
        assert tool.main(["--wheel-dir", str(tmp_path / "wheels")]) == 0, capsys.readouterr().err
        (wheel,) = (tmp_path / "wheels").iterdir()
        assert wheel.name == f"detectron2-{tool.VERSION}-py3-none-any.whl"
        assert not list(tool.site_packages().iterdir())

        target = tmp_path / "target"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(target), str(wheel)], check=True)
        (metadata,) = target.glob("*.dist-info/METADATA")
        requirements = metadata.read_text()
        assert "Requires-Dist: fvcore" in requirements
        assert "black" not in requirements
        assert "Requires-Dist: torch" not in requirements
        assert [file.read_text() for file in target.rglob("LICENSE")] == ["the licence\n"]

        program = """if True:
            import sys
            sys.path[:0] = [sys.argv[1]]
            from detectron2 import model_zoo
            assert open(model_zoo.get_config_file("Base.yaml")).read() == "VERSION: 2\\n"
            assert open(model_zoo.get_config_file("COCO/fpn.py")).read() == "lr = 0.02\\n"
            import detectron2.projects.point_rend, detectron2.projects.panoptic_deeplab
            import detectron2.evaluation.fast_eval_api
            from detectron2.layers import nms, rotated_boxes
            for compiled in (nms.nms_rotated, rotated_boxes.iou):
                try:
                    compiled()
                except ImportError as error:
                    print(error)
            """
        done = subprocess.run(
            [sys.executable, "-c", program, str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.strip().splitlines()[-2:]
        assert first.startswith("nms_rotated is one of Detectron2's compiled operators")
        assert second.startswith("box_iou_rotated is one of Detectron2's compiled operators")

    def test_a_wrong_hash_is_refused(
        self,
        tool: ModuleType,
        sdist: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        recorded(tool, monkeypatch, None)
        probed(tool, monkeypatch, False)
        assert "SHA-256" in fails_with(tool, capsys)
        assert not list(tool.site_packages().iterdir())

    def test_nothing_to_download(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        recorded(tool, monkeypatch, None)
        probed(tool, monkeypatch, False)
        assert "could not download pb1-detectron2==0.6: No matching" in fails_with(tool, capsys)

    def test_members_outside_the_folder_are_refused(self, tool: ModuleType, tmp_path: Path) -> None:
        if not hasattr(tarfile, "data_filter"):
            pytest.skip("this Python's tarfile has no filters")
        with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("../outside"))
        with pytest.raises(tarfile.FilterError):
            tool.unpack(tmp_path / "sdist.tar.gz", tmp_path / "work")
        assert not (tmp_path / "work" / "outside").exists()


class TestWhatIsThere:
    """What is done depends on which Detectron2 the environment names and whether it works."""

    @pytest.fixture
    def done(self, tool: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The pip commands that were run; none of them does anything but the building."""
        commands: list[str] = []

        def run_pip(pip: list[str], command: str, *arguments: str, doing: str) -> None:
            commands.append(command)
            if command == "wheel":
                folder = Path(arguments[arguments.index("--wheel-dir") + 1])
                folder.mkdir()
                (folder / "detectron2.whl").touch()

        monkeypatch.setattr(tool, "download", lambda work: work / "sdist")
        monkeypatch.setattr(tool, "unpack", lambda sdist, work: tree)
        monkeypatch.setattr(tool, "run_pip", run_pip)
        return commands

    @pytest.mark.parametrize("version", [None, "0.6", "0.6+cu118", "0.7", "this one"])
    def test_a_working_one_is_left_alone(
        self,
        tool: ModuleType,
        done: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
        version: str | None,
    ) -> None:
        recorded(tool, monkeypatch, tool.VERSION if version == "this one" else version)
        probed(tool, monkeypatch, True)
        assert tool.main([]) == 0
        assert done == []
        assert "0.6 in here works: nothing to install" in capsys.readouterr().out

    def test_a_broken_one_of_the_users_own_is_not_replaced_unasked(
        self,
        tool: ModuleType,
        done: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        recorded(tool, monkeypatch, "0.6")
        probed(tool, monkeypatch, False)
        message = fails_with(tool, capsys)
        assert "it is broken" in message
        assert "--force" in message
        assert done == []

    @pytest.mark.parametrize(
        ("arguments", "version", "works"),
        [
            pytest.param([], None, False, id="none"),
            pytest.param([], "0.6+pure.1", False, id="half-deleted"),
            pytest.param([], "0.6+pure.0", True, id="mended by an older revision"),
            pytest.param(["--force"], "0.6", None, id="forced"),
        ],
    )
    def test_everything_else_is_replaced(
        self,
        tool: ModuleType,
        done: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
        arguments: list[str],
        version: str | None,
        works: bool | None,
    ) -> None:
        site = tool.site_packages()
        for remains in (
            "detectron2/layers",
            "detectron2-0.6+pure.1.dist-info",
            "~etectron2/layers",
        ):
            (site / remains).mkdir(parents=True)
        (site / "detectron2_of_another_kind").mkdir()
        recorded(tool, monkeypatch, version)
        probed(tool, monkeypatch, *([] if works is None else [works]), True)
        assert tool.main(arguments) == 0, capsys.readouterr().err
        assert done == ["wheel", "uninstall", "install"]
        assert [path.name for path in site.iterdir()] == ["detectron2_of_another_kind"]

    def test_an_install_that_does_not_import_is_an_error(
        self,
        tool: ModuleType,
        done: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        recorded(tool, monkeypatch, None)
        probed(tool, monkeypatch, False, False)
        assert "does not import: ImportError: it is broken" in fails_with(tool, capsys)


class TestRefusals:
    def test_python(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(tool.sys, "version_info", (3, 15, 0))
        assert "Python 3.10 to 3.14 is needed" in fails_with(tool, capsys)

    def test_missing_packages(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(tool, "find_spec", lambda name: None if "torch" in name else True)
        message = fails_with(tool, capsys, "--force")
        assert "lacks torch, torchvision: install the packages of requirements.txt" in message

    def test_full_disk(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(tool.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
        assert "has 1 MiB free; 100 are needed" in fails_with(tool, capsys, "--force")

    def test_unusable_wheel_dir(
        self,
        tool: ModuleType,
        sdist: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        """Anything the operating system refuses is one line too."""
        monkeypatch.setattr(tool, "SDIST_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
        recorded(tool, monkeypatch, None)
        (tmp_path / "file").touch()
        assert "File exists" in fails_with(
            tool, capsys, "--force", "--wheel-dir", str(tmp_path / "file")
        )
        assert not list(tool.site_packages().iterdir())


class TestPip:
    def test_a_pip_that_refuses_the_sdist_is_not_used(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """From 26.3 on, an older pip is downloaded and run from its wheel."""
        fetched = []

        def pip_download(pip: list[str], work: Path, package: str, *rest: str) -> Path:
            fetched.append(package)
            return work / "pip.whl"

        monkeypatch.setattr(tool, "pip_download", pip_download)
        monkeypatch.setattr(tool.importlib.metadata, "version", lambda package: "26.2.1")
        assert tool.old_enough_pip(tmp_path) == [sys.executable, "-m", "pip"]
        assert fetched == []
        monkeypatch.setattr(tool.importlib.metadata, "version", lambda package: "27.0")
        assert tool.old_enough_pip(tmp_path) == [sys.executable, str(tmp_path / "pip.whl" / "pip")]
        assert fetched == ["pip==26.2.1"]

    @pytest.mark.parametrize(
        ("said", "gist"),
        [
            ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM ...", "SHA-256"),
            ("WARNING: Retrying: NewConnectionError(...)\nERROR: No match", "cannot be reached"),
            ("ERROR: first\nERROR: second\n", "second"),
            ("error: code-a\n  > [2 lines]\n  ImportError: no b\n  c\nerror: code-d\n", "no b"),
            ("error: externally-managed-environment\n", "externally-managed-environment"),
            ("", "does not say why"),
        ],
    )
    def test_the_gist_of_what_it_says(self, tool: ModuleType, said: str, gist: str) -> None:
        assert gist in tool.gist(said)


class TestProbe:
    """A Detectron2 counts as working only if a fresh interpreter can use it."""

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A made-up one ahead of any other on the path, with its record."""
        folder = tmp_path / "path" / "detectron2"
        for name in ("engine", "evaluation", "modeling", "utils"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").touch()
        (folder / "__init__.py").write_text('__version__ = "0.6"\n')
        metadata = tmp_path / "path" / "detectron2-0.6.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n"
        )
        record = ["detectron2/utils/__init__.py,,", "detectron2/utils/__pycache__/x.pyc,,"]
        (metadata / "RECORD").write_text("\n".join(record))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
        return folder

    def test_a_whole_one_works(self, tool: ModuleType, package: Path) -> None:
        assert tool.probe() == (True, f"0.6 in {package}")

    def test_an_emptied_one_does_not(self, tool: ModuleType, package: Path) -> None:
        """Its folders import all the same, as namespace packages."""
        for name in ("engine", "evaluation", "modeling", "utils"):
            (package / name / "__init__.py").unlink()
        works, _ = tool.probe()
        assert not works

    def test_one_that_lacks_a_file_does_not(self, tool: ModuleType, package: Path) -> None:
        (package / "utils" / "__init__.py").unlink()
        works, report = tool.probe()
        assert not works
        assert "detectron2/utils/__init__.py is missing" in report

    def test_the_folder_it_is_run_from_does_not_count(
        self, tool: ModuleType, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stray = tmp_path / "stray"
        (stray / "detectron2").mkdir(parents=True)
        (stray / "detectron2" / "__init__.py").write_text("raise ImportError('stray')")
        monkeypatch.chdir(stray)
        assert tool.probe() == (True, f"0.6 in {package}")
