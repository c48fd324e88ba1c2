"""What a benchmark should find, from a small model of what the parts of a simulation cost.

On a CPU, per simulator with a core of its own, milliseconds at 256 px:
    a control step   30 stock, 7 vlactl: 75 against 25 forward passes, and less Python
    a picture        150 stock, 110 vlactl; stock draws at every step, vlactl once per chunk
    a reset          2400 stock, which compiles the scene anew; 2 vlactl; plus settling, pictures
For a GPU, 16 simulators on 16 cores and one H100, all together and per second:
    control steps    stock 441, 297, 200 with 0, 1, 2 cameras; vlactl 2660 without pictures
    pictures         610, however many processes draw; their size hardly matters
    a reset          2.6 seconds of stock, all simulators at once, plus settling
Source: single parts, measured on libero_spatial with stock LIBERO and a prototype of the fast core
(mujoco 3.17, a shared two-core machine and an H100 with 16 cores) before this benchmark existed.
Other processors have other costs, and a machine of few cores per GPU gains less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GPU_SIMULATORS = 16
GPU_STOCK_STEPS = {0: 441.0, 1: 297.0, 2: 200.0}
GPU_FAST_STEPS = 2660.0
GPU_PICTURES = 610.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one simulator of a side, while all others are busy too."""

    step: float
    reset: float

    def episode(self, steps: float) -> float:
        """A reset and so many control steps."""
        return self.reset + steps * self.step


def costs(*, gpu: bool, num_cameras: int, chunk_length: int, wait_steps: int) -> dict[str, Costs]:
    """Of both sides, with pictures drawn on a GPU or not."""
    if gpu:
        stock_step = GPU_SIMULATORS / GPU_STOCK_STEPS[num_cameras]
        physics = GPU_SIMULATORS / GPU_FAST_STEPS
        pictures = GPU_SIMULATORS * num_cameras / GPU_PICTURES
        rebuild, restore = 2.6, 0.0
        step = max(physics, pictures / chunk_length)  # threads draw and step at the same time
    else:
        stock_step = 0.030 + 0.150 * num_cameras
        physics, pictures = 0.007, 0.110 * num_cameras
        rebuild, restore = 2.4, 0.002
        step = physics + pictures / chunk_length
    return {
        "stock": Costs(step=stock_step, reset=rebuild + wait_steps * stock_step),
        "ours": Costs(step=step, reset=restore + wait_steps * physics + pictures),
    }


def ratios(sides: Mapping[str, Costs], horizon: int, mean_length: float | None) -> dict[str, float]:
    """What is expected of vlactl relative to stock; of episodes only where some are played."""
    stock, ours = sides["stock"], sides["ours"]
    found = {"steps_per_second": stock.step / ours.step, "reset": stock.reset / ours.reset}
    if mean_length is not None:
        found["episodes_per_hour"] = stock.episode(horizon) / ours.episode(mean_length)
    return found
