"""Saving and loading training state with torch's distributed checkpoints.

All randomness of a run is keyed by meaning, so a checkpoint holds no generator states: parameters,
optimizer and the step number determine everything that follows.

The metadata file of a distributed checkpoint is a pickle: it is read only from directories whose
manifest (with its hash) verifies, i.e. that vlactl wrote.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict import set_state_dict as set_both_state_dicts
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from vlactl import __version__
from vlactl.distributed.roles import World
from vlactl.errors import IntegrityError
from vlactl.hub.manifest import (
    CHECKPOINTS,
    list_checkpoints,
    publish,
    step_name,
    verify_manifest,
    write_manifest,
)

LOG = logging.getLogger(__name__)
FORMAT = 1


def save_checkpoint(
    run_dir: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    keep: int,
) -> Path:
    """Write the state after `step` finished steps and prune old checkpoints. Called on every rank.

    Returns:
        The directory, which is complete when this returns.
    """
    final = run_dir / CHECKPOINTS / step_name(step)
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    model_state, optimizer_state = get_state_dict(module, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=temporary)
    world.barrier()
    if world.is_main:
        header = {
            "format": FORMAT,
            "step": step,
            "vlactl": __version__,
            "torch": torch.__version__,
            "world_size": world.size,
        }
        write_manifest(temporary, header)
        publish(temporary, final)
        _prune(run_dir, keep)
    world.barrier()
    return final


def load_checkpoint(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Load parameters, and the optimizer where one is given. Called on every rank.

    Returns:
        The number of finished steps.

    Raises:
        IntegrityError: the directory is damaged, of another format, or of another model.
    """
    manifest = verify_manifest(directory)
    if manifest.get("format") != FORMAT:
        raise IntegrityError(
            f"{directory} has checkpoint format {manifest.get('format')}, not {FORMAT}",
            hint=f"it was written by vlactl {manifest.get('vlactl')}",
        )
    state: dict[str, Any]
    if optimizer is None:
        state = {"model": module.state_dict()}
    else:
        model_state, optimizer_state = get_state_dict(module, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
    try:
        load(state, checkpoint_id=directory)
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise IntegrityError(
            f"{directory} does not fit this model: {_first_line(error)}",
            hint="evaluate or resume with the configuration that the run was started with",
        ) from error
    if optimizer is None:
        set_model_state_dict(module, state["model"])
    else:
        set_both_state_dicts(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    return int(manifest["step"])


def _prune(run_dir: Path, keep: int) -> None:
    for _, path in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for leftover in (run_dir / CHECKPOINTS).glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
