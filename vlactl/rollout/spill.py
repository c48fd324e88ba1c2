"""Pictures of a step that are too many for the host's memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from vlactl.errors import TrainingError

SEGMENT_BYTES = 2**28


class Spill:
    """Keeps pictures in files that are mapped into memory: the system writes out what is not used.

    A file has no name, so nothing is left of it when its process is killed, and it goes when the
    last picture in it is forgotten.

    Args:
        directory: on a disk with enough room.
        segment_bytes: of one file; pictures are not larger.
    """

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory, self._segment_bytes = directory, segment_bytes
        self._segment: mmap.mmap | None = None
        self._used = 0

    def keep(self, picture: np.ndarray) -> np.ndarray:
        """The same picture, in a file.

        Raises:
            TrainingError: there is no room for it.
        """
        if self._segment is None or self._used + picture.nbytes > self._segment_bytes:
            self._segment, self._used = self._new_segment(), 0
        kept = np.frombuffer(self._segment, np.uint8, picture.nbytes, self._used)
        kept = kept.view(picture.dtype).reshape(picture.shape)
        kept[...] = picture
        self._used += picture.nbytes
        return kept

    def _new_segment(self) -> mmap.mmap:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory) as file:
                os.posix_fallocate(file.fileno(), 0, self._segment_bytes)  # a full disk shows here
                return mmap.mmap(file.fileno(), self._segment_bytes)
        except OSError as error:
            raise TrainingError(
                f"pictures that host memory cannot hold cannot be kept in {self._directory}: "
                f"{error.strerror}",
                hint="make room there, or lower rollout.episodes_per_step",
            ) from error
