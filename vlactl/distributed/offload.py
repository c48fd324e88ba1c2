"""State that leaves the device while others need its memory.

Tensors keep their identity: their storage is emptied and filled again, so that parameters,
optimizers and sharded wrappers that refer to them need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vlactl.distributed.sharding import local

Tensors = Callable[[], Iterable[torch.Tensor]]


class HostCopy:
    """Tensors that are kept in host memory for a while, pinned where a GPU copies from it.

    Args:
        tensors: asked for whenever they are to leave.
        progress: called after every tensor; to get pinned memory for the first time takes long.
    """

    def __init__(self, tensors: Tensors, progress: Callable[[], None]) -> None:
        self._tensors, self._progress = tensors, progress
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self._buffers: dict[int, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def to_host(self) -> None:
        """Copy to host memory and free the device's."""
        storages = _storages(self._tensors())
        for number, storage in enumerate(storages):
            buffer = self._buffer(number, storage)
            buffer.copy_(_bytes(storage), non_blocking=True)
            self._away.append((storage, buffer))
            self._progress()
        if any(storage.device.type == "cuda" for storage in storages):
            torch.cuda.current_stream().synchronize()
        for storage in storages:
            storage.resize_(0)

    def fetch(self) -> None:
        """Begin to copy back; nothing may be used before `wait`."""
        for storage, buffer in self._away:
            storage.resize_(buffer.numel())
        if not any(storage.device.type == "cuda" for storage, _ in self._away):
            self._copy_back()
            return
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy_back()

    def wait(self) -> None:
        """Until everything is back."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _copy_back(self) -> None:
        for storage, buffer in self._away:
            _bytes(storage).copy_(buffer, non_blocking=True)
        self._away.clear()

    def _buffer(self, number: int, storage: torch.UntypedStorage) -> torch.Tensor:
        """Pinned memory is slow to get: it is kept for the next time."""
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() != storage.nbytes():
            is_cuda = storage.device.type == "cuda"
            buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_cuda)
            self._buffers[number] = buffer
        return buffer


class Discarded:
    """Tensors whose values are worth nothing for a while: they give their memory back.

    Args:
        tensors: always the same ones.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._sizes = [(storage, storage.nbytes()) for storage in _storages(tensors)]

    def free(self) -> None:
        """Give the memory back."""
        for storage, _ in self._sizes:
            storage.resize_(0)

    def allocate(self) -> None:
        """Take memory again; the values are undefined."""
        for storage, size in self._sizes:
            storage.resize_(size)


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once."""
    storages = (local(tensor).untyped_storage() for tensor in tensors)
    found = {storage._cdata: storage for storage in storages}
    return [storage for storage in found.values() if storage.nbytes()]


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
