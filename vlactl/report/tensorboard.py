"""The TensorBoard sink: event files in `tensorboard/` below the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlactl.api.contracts import Sink
from vlactl.api.plugins import PluginConfig, Requirement, SinkPlugin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorboardConfig(PluginConfig):
    """The sink has no settings."""

    name: Literal["tensorboard"] = "tensorboard"


PLUGIN = SinkPlugin(
    name="tensorboard",
    summary="event files for TensorBoard, in RUN/tensorboard",
    config=TensorboardConfig,
    factory="vlactl.report.tensorboard:make_sink",
    api_version=1,
    requirements=(
        Requirement(
            distribution="tensorboard",
            specifier=">=2.19",
            install='pip install "tensorboard>=2.19"',
        ),
    ),
)


def make_sink(config: TensorboardConfig, run_dir: Path) -> Sink:
    """A sink that writes below a run directory."""
    return TensorboardSink(run_dir / config.name)


class TensorboardSink:
    """Scalars of every step; the event file is opened by the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        if self._writer is None:
            self._writer = _open_writer(self._folder, step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()


def _open_writer(folder: Path, first_step: int) -> SummaryWriter:
    """Purging hides the steps that a resumed run plays again from an earlier file."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)
