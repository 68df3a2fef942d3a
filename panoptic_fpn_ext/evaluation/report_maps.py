"""report_maps.zip: small maps of the predictions of all images, for pages that compare two runs."""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from detectron2.data import Metadata

from ..errors import UserError
from .page_pictures import ShownImage

NAME = "report_maps.zip"
MOST_BYTES = 100_000_000
DAMAGES = (zipfile.BadZipFile, zlib.error, RuntimeError, OSError)
COLORS = "colors.json"
COLOR_KEYS = ("thing_colors", "stuff_colors")


def write_maps(
    path: Path, images: Iterable[tuple[str, ShownImage]], metadata: Metadata
) -> tuple[int, int]:
    """Write the maps of images, in this order, as long as they are :data:`MOST_BYTES` at most.

    Args:
        path: the file; an old one stays until the new one is whole.
        images: name, unique, and what is kept.
        metadata: its colours are kept, too.

    Returns:
        How many images there are, and how many are left out.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    written = left_out = size = 0
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        colors = {key: metadata.get(key, None) for key in COLOR_KEYS}
        archive.writestr(COLORS, msgspec.json.encode(colors))
        for name, image in images:
            content = msgspec.msgpack.encode(image)
            size += len(content)
            if size > MOST_BYTES:
                left_out += 1
                continue
            archive.writestr(name, content)
            written += 1
    os.replace(unfinished, path)
    return written, left_out


class KeptMaps:
    """The maps of a run, read one by one."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self._path = archive, path
        self._names = set(archive.namelist()) - {COLORS}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> ShownImage:
        """What is kept of an image that is there.

        Raises:
            UserError: the file is damaged.
        """
        return self._read(name, msgspec.msgpack.Decoder(ShownImage))

    def metadata(self) -> Metadata:
        """The colours of the categories; none where the dataset has none."""
        colors: dict[str, Any] = self._read(COLORS, msgspec.json.Decoder(dict[str, Any]))
        return Metadata(**{key: value for key, value in colors.items() if value})

    def _read(self, name: str, decoder: Any) -> Any:
        try:
            return decoder.decode(self._archive.read(name))
        except (*DAMAGES, KeyError, msgspec.MsgspecError) as error:
            raise UserError(f"{self._path}: {name} in it is damaged; evaluate again") from error


@contextmanager
def kept_maps(path: Path) -> Iterator[KeptMaps | None]:
    """The maps of a run; None where there are none.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        yield None
        return
    except DAMAGES as error:
        raise UserError(f"{path}: cannot be read: {error}; evaluate again") from error
    with archive:
        yield KeptMaps(archive, path)
