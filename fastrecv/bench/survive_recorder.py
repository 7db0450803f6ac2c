"""The handler of services that are to survive: it writes down every batch, and hangs when it is told to.

A file a process, named after it, in the folder that FOLDER names in the environment; rows of NUMBERED as they came.
What has been written stays when the process is killed, but for half a row at the end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fastrecv.bench.numbered import NUMBERED

__all__ = ["DWELL", "FOLDER", "HANDLER", "HANG", "ROWS", "Recorder"]

FOLDER = "FASTRECV_RECORDS"
HANDLER = f"{__name__}:Recorder"
HANG = "hang"
"""A file of this name in the folder: whoever removes it hangs, with a batch in its hands."""
DWELL = "FASTRECV_DWELL"
"""Seconds with each batch, in the environment: so that who is killed mostly has one in his hands."""
ROWS = ".rows"


class Recorder:
    """Needs no privilege."""

    def start(self) -> None:
        folder = Path(os.environ[FOLDER])
        self._hang = folder / HANG
        self._dwell = float(os.environ.get(DWELL, "0"))
        path = folder / f"{os.getpid()}{ROWS}"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)

    def handle(self, batch: Any) -> None:
        try:
            os.unlink(self._hang)  # noqa: PTH108 - a call a batch is to cost little
        except FileNotFoundError:
            if self._dwell:
                time.sleep(self._dwell)
            os.write(self._fd, batch.records(NUMBERED).tobytes())
        else:
            while True:
                time.sleep(1)
