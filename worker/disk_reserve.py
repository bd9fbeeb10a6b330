"""A little of the disk kept for changes that make room, as the deletion of a collection does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vecfleet.common.errors import Unavailable

FILE_NAME = "reserve"
_BYTES = 2 << 20
_SLICE_BYTES = 256 << 10  # several times what a change of the catalogue writes
_SPARE = 4  # the disk must have so many times the reserve before it is filled

_Result = TypeVar("_Result")


class DiskReserve:
    """One file in ``directory``, used by the one who writes there."""

    def __init__(self, directory: Path) -> None:
        """Nothing is taken before ``fill``."""
        self._directory = directory
        self._path = directory / FILE_NAME

    def fill(self) -> None:
        """Take what is missing, where the disk has plenty; cheap where nothing is."""
        with suppress(OSError):
            missing = _BYTES - self._size()
            if missing > 0 and self._free() >= _SPARE * _BYTES:
                with self._path.open("ab") as file:
                    file.write(bytes(missing))

    def in_need(self, work: Callable[[], _Result]) -> _Result:
        """What ``work`` returns; on a full disk it is tried again with some of the reserve.

        ``work`` must change nothing when it raises ``Unavailable``.
        """
        try:
            return work()
        except Unavailable:
            if not self._give_up():
                raise
            return work()

    def _give_up(self) -> bool:
        """Whether the disk is full, and there is a little room now."""
        with suppress(OSError):
            size = self._size()
            if size and self._free() < _SLICE_BYTES:
                # The rest is for the next one: what is free now is soon taken by others.
                os.truncate(self._path, max(0, size - _SLICE_BYTES))
                return True
        return False

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _free(self) -> int:
        return shutil.disk_usage(self._directory).free
