"""What the simulators of one process share: compiled tasks and the GL context."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from functools import cache, partial

from vlactl_libero.core import FastStage
from vlactl_libero.pictures import Drawable, Studio
from vlactl_libero.task_model import TaskModel
from vlactl_libero.tasks import LiberoTask


def workshop(image_size: int, has_pictures: bool, task_cache: int) -> Workshop:
    """This process's workshop; the arguments are those of `Workshop`."""
    with _FIRST:
        return _workshop(image_size, has_pictures, task_cache)


class Workshop:
    """Compiled tasks, kept for the next episode of the same task.

    Args:
        image_size: height and width of pictures.
        has_pictures: a camera is used, so there is a GL context.
        task_cache: tasks that are kept; those in use are kept in any case.
    """

    def __init__(self, image_size: int, has_pictures: bool, task_cache: int) -> None:
        self._image_size, self._task_cache = image_size, task_cache
        self._studio = Studio() if has_pictures else None
        self._shelf: dict[LiberoTask, _Entry] = {}  # the one left longest ago comes first
        self._lock = threading.Lock()

    def open(self, task: LiberoTask) -> FastStage:
        """A stage for one simulator; the task is compiled unless it is here."""
        with self._lock:
            entry = self._shelf.get(task)
            if entry is None:
                self._make_room()
                entry = self._shelf[task] = self._build(task)
            entry.users += 1
        view = entry.drawable.view() if entry.drawable else None
        return FastStage(entry.model, view, on_close=partial(self._leave, task))

    def _leave(self, task: LiberoTask) -> None:
        with self._lock:
            entry = self._shelf[task] = self._shelf.pop(task)
            entry.users -= 1

    def _build(self, task: LiberoTask) -> _Entry:
        model = TaskModel(task.bddl_file)
        studio = self._studio
        drawable = studio.upload(model.model, self._image_size) if studio else None
        return _Entry(model, drawable)

    def _make_room(self) -> None:
        unused = [task for task, entry in self._shelf.items() if not entry.users]
        excess = max(0, len(self._shelf) + 1 - self._task_cache)
        for task in unused[:excess]:
            drawable = self._shelf.pop(task).drawable
            if drawable is not None:
                drawable.free()
        if excess:
            gc.collect()  # robosuite's environments contain cycles


@dataclass(slots=True)
class _Entry:
    model: TaskModel
    drawable: Drawable | None
    users: int = 0


_workshop = cache(Workshop)
_FIRST = threading.Lock()
