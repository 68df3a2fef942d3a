"""What command lines share: mistakes in one line, files that are whole or not there."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of ``path``, an ``--output``, once it is whole.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise UserError(f"--output {error.filename or path}: {error.strerror}") from error
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
