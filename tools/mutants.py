#!/usr/bin/env python
"""Make small wrong changes in the package, one at a time, and list those that no test sees.

python tools/mutants.py                                     # a sample of each module
python tools/mutants.py panoptic_fpn_ext/modeling/merging.py --number 50

Each change is made in a copy of the repository and tried with the tests that mirror the module.
Exit status 1 if any survive.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT = ("modeling", "layers", "evaluation", "engine/trainer.py", "engine/launch.py")
TIMEOUT = 600  # seconds; a change that makes the tests hang is seen

SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
PAIRS = (
    *(("min", "max"), ("minimum", "maximum"), ("all", "any"), ("floor", "ceil")),
    *(("amax", "amin"), ("zeros", "ones"), ("argmin", "argmax")),
)
NAMES = {name: other for pair in PAIRS for name, other in (pair, pair[::-1])}


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, object, object]]:
    """What can be changed in a module: node, its attribute, and the value now and then."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            swapped = [SWAPS[type(operator)]() for operator in node.ops]
            yield node, "ops", node.ops, swapped
        elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
            yield node, "op", node.op, SWAPS[type(node.op)]()
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node, "attr", node.attr, NAMES[node.attr]
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node, "id", node.id, NAMES[node.id]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", node.value, not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            yield node, "value", node.value, node.value + 1
        elif isinstance(node, ast.If):
            yield node, "test", node.test, ast.Constant(value=False)


def tests_of(module: Path) -> list[str]:
    """The tests that mirror a module; those of its folder where it has none of its own."""
    inner = module.relative_to("panoptic_fpn_ext")
    own = REPOSITORY / "tests" / inner.with_name(f"test_{inner.name}")
    folder = own.parent if own.parent.is_dir() else REPOSITORY / "tests"
    return [str((own if own.is_file() else folder).relative_to(REPOSITORY))]


def survives(copy: Path, module: Path) -> bool:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "-n0",
        "-p",
        "no:cacheprovider",
        *tests_of(module),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", type=Path, help="files or folders of the package")
    parser.add_argument("--number", type=int, default=3, help="changes of each module")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    roots = args.modules or [Path("panoptic_fpn_ext", name) for name in DEFAULT]
    modules = [
        module
        for root in roots
        for module in (sorted(root.rglob("*.py")) if root.is_dir() else [root])
        if module.name != "__init__.py"
    ]
    rng = random.Random(args.seed)
    survivors, number = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "output", "__pycache__", ".*_cache")
        shutil.copytree(REPOSITORY, copy, ignore=ignored)
        for module in tqdm(modules, desc="mutants", unit="module"):
            source = (copy / module).read_text()
            places = range(len([*changes(ast.parse(source))]))
            for place in sorted(rng.sample(places, min(args.number, len(places)))):
                tree = ast.parse(source)
                node, attribute, before, after = [*changes(tree)][place]
                setattr(node, attribute, after)
                (copy / module).write_text(ast.unparse(tree))
                number += 1
                if survives(copy, module):
                    line = source.splitlines()[node.lineno - 1].strip()
                    change = f"{_text(before)} -> {_text(after)}"
                    survivors.append(f"{module}:{node.lineno}: {change}: {line}")
                    tqdm.write(survivors[-1])
            (copy / module).write_text(source)
    print(f"{len(survivors)} of {number} survive")
    return int(bool(survivors))


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return ast.unparse(value) or type(value).__name__ if isinstance(value, ast.AST) else repr(value)


if __name__ == "__main__":
    sys.exit(main())
