"""Pictures for simulators that share a process, byte for byte those of stock's renderer.

A `Studio` owns the process's only GL context and the thread that uses it. A `Drawable` is a task's
model with its meshes and textures in that context. A `View` belongs to one simulator: `capture`
notes on the CPU what cameras see now, so that the physics may go on, and `draw` makes the pictures.
Views work in any threads, each in one at a time. MuJoCo's own functions release the GIL, except
while a model is uploaded.

What is drawn, and what is left out because no pixel would show it, is decided in `culling`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import mujoco
import numpy as np

from vlactl_libero.culling import Boxes, Culling, Eye, Part
from vlactl_libero.tasks import CAMERA_NAMES

_COLLISION_GROUP = 0
_MAX_GEOMS = 1000
"""As many as stock draws."""
_Result = TypeVar("_Result")


class Studio:
    """The GL context of this process, of the kind that MUJOCO_GL names, and its thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="studio")
        self._context = self.run(_open_context)

    def run(self, job: Callable[[], _Result]) -> _Result:
        """Do something in the context and wait for it."""
        return self._thread.submit(job).result()

    def close(self) -> None:
        """Free the context, after the drawables; nothing else may be called afterwards."""
        self.run(self._context.free)
        self._thread.shutdown()


class Drawable:
    """A model's meshes and textures in the context, until `free`.

    Args:
        studio: of this process.
        model: compiled.
        image_size: height and width of pictures.

    Attributes:
        model: shared by simulators.
        size: height and width of pictures.
        culling: decides what to leave out.
        cameras: name as users know it -> MuJoCo's camera.
    """

    def __init__(self, studio: Studio, model: mujoco.MjModel, image_size: int) -> None:
        self.model, self.size = model, image_size
        self.culling = Culling(model, _OPTION)
        self.cameras = {name: _camera(model, theirs) for name, theirs in CAMERA_NAMES.items()}
        self._studio = studio
        self._lock = threading.Lock()
        # A buffer of exactly the pictures' size: the same pixels, sooner.
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0  # 64 MiB that nothing would be drawn from
        font = mujoco.mjtFontScale.mjFONTSCALE_50  # no text is drawn
        self._context = studio.run(lambda: mujoco.MjrContext(model, font))

    def free(self) -> None:
        """Give its memory in the context back; its views cannot draw any more."""
        self._studio.run(self._context.free)

    def fill(
        self,
        scene: mujoco.MjvScene,
        data: mujoco.MjData,
        camera: mujoco.MjvCamera,
        hidden: np.ndarray,
        sites: np.ndarray,
        alphas: np.ndarray,
    ) -> None:
        """Note in a scene what a camera sees, but for the `hidden` geoms."""
        model = self.model
        with self._lock:  # what is hidden or glows differs between the model's simulators
            model.site_rgba[sites, 3] = alphas
            groups = model.geom_group[hidden]
            model.geom_group[hidden] = _COLLISION_GROUP
            mujoco.mjv_updateScene(
                model, data, _OPTION, None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene
            )
            model.geom_group[hidden] = groups

    def render(self, pictures: Sequence[Sequence[Shot]]) -> list[np.ndarray]:
        """Pictures as GL has them, bottom row first, each put together from its shots."""
        return self._studio.run(lambda: [self._compose(shots) for shots in pictures])

    def _compose(self, shots: Sequence[Shot]) -> np.ndarray:
        picture = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        for scene, part in shots:
            mujoco.mjr_render(mujoco.MjrRect(0, 0, self.size, self.size), scene, self._context)
            if part.mask is None:
                self._read(picture, 0, 0)
            else:
                left, bottom = part.corner
                height, width = part.mask.shape
                patch = np.empty((height, width, 3), np.uint8)
                self._read(patch, left, bottom)
                place = picture[bottom : bottom + height, left : left + width]
                np.copyto(place, patch, where=part.mask[:, :, None])
        return picture

    def _read(self, pixels: np.ndarray, left: int, bottom: int) -> None:
        height, width, _ = pixels.shape
        rectangle = mujoco.MjrRect(left, bottom, width, height)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._context)


class Shot(NamedTuple):
    """A scene to draw, and the pixels of it to take."""

    scene: mujoco.MjvScene
    part: Part


class View:
    """Pictures of one simulator."""

    def __init__(self, drawable: Drawable) -> None:
        self._drawable = drawable
        self._scenes: dict[tuple[str, int], mujoco.MjvScene] = {}
        self._shots: dict[str, list[Shot]] = {}

    def capture(
        self, data: mujoco.MjData, cameras: Sequence[str], sites: np.ndarray, alphas: np.ndarray
    ) -> None:
        """Note what cameras see now.

        Args:
            data: of the drawable's model.
            cameras: of `CAMERA_NAMES`.
            sites: ids of the sites whose visibility is this simulator's own.
            alphas: their opacity.
        """
        boxes = self._drawable.culling.boxes(data)
        self._shots = {
            camera: list(self._take(data, camera, boxes, sites, alphas)) for camera in cameras
        }

    def draw(self) -> dict[str, np.ndarray]:
        """Camera -> uint8 [H, W, 3] of what was captured last, turned by 180 degrees."""
        pictures = self._drawable.render(list(self._shots.values()))
        return dict(zip(self._shots, map(_turn, pictures), strict=True))

    def close(self) -> None:
        """Drop what was captured; nothing else may be called afterwards."""
        self._scenes.clear()
        self._shots.clear()

    def _take(
        self, data: mujoco.MjData, name: str, boxes: Boxes, sites: np.ndarray, alphas: np.ndarray
    ) -> Iterator[Shot]:
        drawable = self._drawable
        camera = drawable.cameras[name]
        mujoco.mjv_updateCamera(drawable.model, data, camera, self._scene(name, 0))
        eye = Eye.of(self._scene(name, 0), drawable.size)
        for index, part in enumerate(drawable.culling.parts(data, eye, boxes)):
            scene = self._scene(name, index)
            drawable.fill(scene, data, camera, part.hidden, sites, alphas)
            scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = part.reflects
            yield Shot(scene, part)

    def _scene(self, camera: str, index: int) -> mujoco.MjvScene:
        if (camera, index) not in self._scenes:
            self._scenes[camera, index] = mujoco.MjvScene(self._drawable.model, _MAX_GEOMS)
        return self._scenes[camera, index]


def _turn(pixels: np.ndarray) -> np.ndarray:
    """Rotate by 180 degrees; channel by channel, which numpy does several times faster."""
    turned = np.empty_like(pixels)
    for channel in range(3):
        turned[:, :, channel] = pixels[::-1, ::-1, channel]
    return turned


def _camera(model: mujoco.MjModel, name: str) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    camera.fixedcamid = model.camera(name).id
    return camera


def _open_context() -> mujoco.GLContext:
    context = mujoco.GLContext(1, 1)  # the size of a window that nothing is drawn to
    context.make_current()
    return context


def _make_option() -> mujoco.MjvOption:
    option = mujoco.MjvOption()
    option.geomgroup[_COLLISION_GROUP] = 0
    return option


_OPTION = _make_option()
