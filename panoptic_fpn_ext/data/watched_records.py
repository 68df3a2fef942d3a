"""Mapped records whose errors say which record it was, even that of a process that died at it."""

import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.data import DatasetFromList, MapDataset
from torch.utils.data import Dataset, get_worker_info

from ..errors import UserError

logger = logging.getLogger(__name__)

_REASONS = {  # parts of what PyTorch says of a process that died, and what helps
    "signal: Killed": "if the machine ran out of memory, lower DATALOADER.NUM_WORKERS",
    "signal: Bus error": "if /dev/shm is full, enlarge it (docker run --shm-size) or lower "
    "DATALOADER.NUM_WORKERS",
}
_DEFAULT_REASON = "DATALOADER.NUM_WORKERS 0 may show why"


class WatchedRecords(Dataset):
    """The records of datasets, each mapped when it is asked for.

    An exception of the mapper becomes a UserError that names dataset and record. Where a process
    that loads dies instead, :func:`deaths_are_named` says at which record.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        *,
        names: Sequence[str] = (),
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            records: dataset dicts.
            mapper: makes the model's input of a record.
            names: of the datasets that the records are of.
            num_workers: processes that load.
        """
        self.records = DatasetFromList(records, copy=False)
        self._mapped = MapDataset(self.records, mapper)
        self._source = f"dataset {' or '.join(names)}: " if names else ""
        # Of each process that loads: its id, and the record it is at.
        self._places = torch.full((num_workers, 2), -1, dtype=torch.int64).share_memory_()
        _watched.add(self)

    def __len__(self) -> int:
        return len(self._mapped)

    def __getitem__(self, index: int) -> dict[str, Any]:
        worker = get_worker_info()
        place = None if worker is None else self._places[worker.id]
        if place is not None:
            place[0], place[1] = os.getpid(), index
        try:
            mapped = self._mapped[index]
        except UserError as error:  # it names the file
            raise UserError(f"{self._source}{error}") from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            line = f"{self._source}{self._name(index)}: {reason}"
            logger.error("%s", line, exc_info=True)
            raise UserError(line) from error
        if place is not None:
            place[1] = -1
        return mapped

    def place_of(self, process: int) -> str | None:
        """Where a process is that loads, or was when it died; None of another process."""
        for known, index in self._places.tolist():
            if known == process:
                return f"{self._source}{self._name(index) if index >= 0 else 'between two images'}"
        return None

    def _name(self, index: int) -> str:
        record = self.records[index]
        return str(record.get("file_name", f"image {record.get('image_id', index)}"))


_watched: "weakref.WeakSet[WatchedRecords]" = weakref.WeakSet()


def is_death(error: BaseException | None) -> bool:
    """Whether PyTorch says by it that a process that loads died.

    The signal of that comes at any time: the error may be raised in any line of the training.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


@contextmanager
def deaths_are_named() -> Iterator[None]:
    """
    Raises:
        UserError: in place of PyTorch's error when a process that loads :class:`WatchedRecords`
            died: it says how, and at which record.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_death(error):
            raise
        first = error  # where PyTorch was waiting for the process, it says how in the cause alone
        while is_death(first.__cause__):
            first = first.__cause__
        message = " ".join(str(first).split())
        processes = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", message)
        dead = [int(number) for number in re.findall(r"\d+", processes[1])]
        places = [place for process in dead for w in _watched if (place := w.place_of(process))]
        how = message[processes.end() :].partition(".")[0].strip()
        hints = [hint for part, hint in _REASONS.items() if part in message]
        raise UserError(
            f"{' and '.join(places) or 'loading images'}: the process that was loading {how}; "
            f"{(hints or [_DEFAULT_REASON])[0]}"
        ) from error
