"""Saving and loading training state with torch's distributed checkpoints.

All randomness of a run is keyed by meaning, so a checkpoint holds no generator states: parameters,
optimizer and the step number determine everything that follows. Of a policy with adapters it holds
the adapters (and the value head): the frozen weights are those of the model that the run's
configuration names, of which it keeps fingerprints.

The metadata file of a distributed checkpoint is a pickle. It is read through a list of the classes
that torch writes there, so a checkpoint from elsewhere cannot run code; torch itself reads shards
with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from vlactl import __version__
from vlactl.distributed.roles import World
from vlactl.errors import IntegrityError
from vlactl.hub.manifest import (
    CHECKPOINTS,
    is_complete,
    list_checkpoints,
    publish,
    step_name,
    verify_manifest,
    write_manifest,
)

FORMAT = 1
METADATA = ".metadata"
FROZEN = "frozen.json"
SAMPLED = 256
"""Numbers of a frozen parameter that enter its fingerprint, about."""
_DCP = "torch.distributed.checkpoint"
_ALLOWED_CLASSES = {
    *((f"{_DCP}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}  # fmt: skip
# Python 3.13 pickles its paths under another name than the versions before and after it.
_PATH_CLASSES = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}


def save_checkpoint(
    run_dir: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    keep: int,
    trained_only: bool = False,
) -> Path:
    """Write the state after `step` finished steps and prune old checkpoints. Called on every rank.

    Args:
        run_dir: of the run.
        step: finished ones.
        module: the policy's.
        optimizer: of its trained parameters.
        world: the ranks.
        keep: how many complete checkpoints stay.
        trained_only: leave out parameters that get no gradient.

    Returns:
        The directory, which is complete when this returns.
    """
    final = run_dir / CHECKPOINTS / step_name(step)
    if world.everyone.any(world.is_main and is_complete(final)):
        return final
    temporary = final.with_suffix(".tmp")
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been complete
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.everyone.barrier()
    if module is not None:
        save(
            _state(module, optimizer, trained_only=trained_only),
            checkpoint_id=temporary,
            process_group=world.saving.group,
            no_dist=world.saving.size == 1,
        )
    world.everyone.barrier()
    if world.is_main:
        if trained_only:
            (temporary / FROZEN).write_text(json.dumps(_fingerprints(module), indent=0))
        header = {
            "format": FORMAT,
            "step": step,
            "vlactl": __version__,
            "torch": torch.__version__,
            "world_size": world.everyone.size,
            "trained_only": trained_only,
        }
        write_manifest(temporary, header)
        publish(temporary, final)
        _prune(run_dir, keep)
    world.everyone.barrier()
    return final


def load_checkpoint(
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group=None,
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
    trained_only = bool(manifest.get("trained_only"))
    if FROZEN in manifest["files"]:
        _check_frozen(directory, module)
    reader = _SafeReader(directory)
    state = _state(module, optimizer, trained_only=trained_only)
    _check_fits(directory, state["model"], reader.read_metadata())
    load(state, storage_reader=reader, process_group=group)
    options = StateDictOptions(strict=not trained_only)
    set_model_state_dict(module, state["model"], options=options)
    if optimizer is not None:
        set_optimizer_state_dict(module, optimizer, state["optimizer"])
    return int(manifest["step"])


def _state(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, *, trained_only: bool
) -> dict[str, dict[str, Any]]:
    """Parameters, and the optimizer's state where there is one, by name."""
    model_state: dict[str, Any] = get_model_state_dict(module)
    if trained_only:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        model_state = {name: value for name, value in model_state.items() if name in trained}
    if optimizer is None:
        return {"model": model_state}
    return {"model": model_state, "optimizer": get_optimizer_state_dict(module, optimizer)}


class _SafeReader(FileSystemReader):
    """Reads a checkpoint whose metadata may come from anywhere."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise IntegrityError(f"{path} does not describe a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch's checkpoint metadata and dtypes, and nothing that could act."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _PATH_CLASSES:
            return PurePosixPath
        if (module, name) not in _ALLOWED_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata")
        return super().find_class(module, name)


def _check_fits(directory: Path, state: Mapping[str, torch.Tensor], metadata: Metadata) -> None:
    """Compare names and shapes of parameters before anything is read."""
    stored = {
        name.removeprefix("model."): tuple(item.size)
        for name, item in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(item, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(
        name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)
    )
    if differing:
        first = differing[0]
        raise IntegrityError(
            f"{directory} is of another model: {len(differing)} of its parameters differ, such as "
            f"{first}: stored {stored.get(first)}, wanted {wanted.get(first)}",
            hint="evaluate or resume with the configuration that the run was started with",
        )


def _fingerprints(module: nn.Module) -> dict[str, str]:
    """Hashes of some numbers of every frozen parameter, at the precision that all dtypes share."""
    prints = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // SAMPLED)].bfloat16().float().cpu().numpy()
            prints[name] = hashlib.blake2b(some.tobytes(), digest_size=8).hexdigest()
    return prints


def _check_frozen(directory: Path, module: nn.Module) -> None:
    """Adapters belong to the weights that they were trained beside.

    Quantised weights have no fingerprint, so what both sides have is compared.
    """
    stored = json.loads((directory / FROZEN).read_text())
    present = _fingerprints(module)
    other = sorted(name for name in stored.keys() & present.keys() if stored[name] != present[name])
    if other:
        raise IntegrityError(
            f"{directory} holds adapters of another model: {len(other)} frozen weights differ, "
            f"such as {other[0]}",
            hint="set model.path to the directory that the run started from",
        )


def _prune(run_dir: Path, keep: int) -> None:
    """Keep the newest complete checkpoints only."""
    everything = [path for _, path in list_checkpoints(run_dir)]
    kept = [path for path in everything if is_complete(path)][-keep:]
    leftovers = (run_dir / CHECKPOINTS).glob("*.tmp")
    for path in (*(path for path in everything if path not in kept), *leftovers):
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints:
    """PLACEHOLDER until the real one is merged."""

    def __init__(self, run_dir, module, optimizer, world, config, *, trained_only):
        self.a = (run_dir, module, optimizer, world, config, trained_only)

    def save(self, step, *, status="running", now=False):
        run_dir, module, optimizer, world, config, trained_only = self.a
        save_checkpoint(
            run_dir, step, module, optimizer, world, keep=config.keep, trained_only=trained_only
        )

    def poll(self):
        pass

    def finish(self):
        pass
