"""What a checkpoint holds, and reading it back, on any number of ranks.

All randomness of a run is keyed by meaning, so a checkpoint holds no generator states: parameters,
optimizer and the step number determine everything that follows. Of a policy with adapters it holds
the adapters (and the value head): the frozen weights are those of the model that the run's
configuration names, of which it keeps fingerprints. Tensors are written by torch's distributed
checkpoints, sharded as they are, and read into whatever sharding the reader has. When and how a
directory becomes a checkpoint is `vlactl.train.saving`.

The metadata file of a distributed checkpoint is a pickle. It is read through a list of the classes
that torch writes there, so a checkpoint from elsewhere cannot run code; torch itself reads shards
with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from vlactl import __version__
from vlactl.distributed.roles import Ranks
from vlactl.distributed.sharding import local, whole
from vlactl.errors import IntegrityError
from vlactl.hub.manifest import read_manifest, verify_large_files, verify_manifest
from vlactl.train.adamw8bit import ShardedAdamW8bit
from vlactl.train.agreement import describe, together

State = dict[str, dict[str, Any]]
"""Tensors in nested dictionaries: "model" and, where there is an optimizer, "optimizer"."""

FORMAT = 1
METADATA = ".metadata"
FROZEN = "frozen.json"
LISTED = 8
"""Tensors that a message names at most."""
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

# Said at every save and load by a single process, which is what is meant; where it is said in a
# thread it cannot be caught.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def checkpoint_state(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, *, trained_only: bool
) -> State:
    """Parameters, and the optimizer's state where there is one: the live tensors, by name.

    Names do not depend on sharding. The module comes first: after a forward pass without a
    backward one it may hold gathered parameters, and forgets them when it is asked for its state.
    """
    model = dict(module.state_dict())
    if trained_only:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        model = {name: value for name, value in model.items() if name in trained}
    if optimizer is None:
        return {"model": model}
    return {"model": model, "optimizer": optimizer_state(module, optimizer)}


def optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The optimizer's tensors by parameter name; rates and such are the configuration's."""
    parameters = _optimized(module, optimizer)
    if isinstance(optimizer, ShardedAdamW8bit):
        return {"state": {name: optimizer.moments(p) for name, p in parameters.items()}}
    return {"state": {name: dict(optimizer.state[p]) for name, p in parameters.items()}}


def load_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Take over what was read into the tensors of `optimizer_state`, unless they are its own."""
    if isinstance(optimizer, ShardedAdamW8bit):
        for name, parameter in _optimized(module, optimizer).items():
            optimizer.load_moments(parameter, state["state"][name])


def _optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if p in trained}


def num_bytes(state: State, num_ranks: int) -> int:
    """This rank's part of what a checkpoint of so many ranks takes on the disk, about."""
    shards = sum(local(t).nbytes for t in _tensors(state) if local(t) is not t)
    replicas = sum(t.nbytes for t in _tensors(state) if local(t) is t)
    return shards + replicas // num_ranks


def stage(state: State, device: torch.device) -> State:
    """A copy in host memory, which training does not change; complete when this returns."""
    copied = _map_tensors(state, lambda t: t.detach().to("cpu", non_blocking=True, copy=True))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copied


def write_shards(state: State, directory: Path, ranks: Ranks) -> None:
    """Write each tensor once, every rank its part. Called on every one of the ranks.

    Raises:
        IntegrityError: it failed on some of them.
    """
    try:
        save(
            state,
            storage_writer=_Writer(directory),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as error:
        raise IntegrityError(_cause(error)) from error


def load_checkpoint(
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: Ranks | None = None,
) -> int:
    """Load parameters, and the optimizer where one is given, in place.

    Args:
        directory: a checkpoint.
        module: of the policy, sharded or not.
        optimizer: of its trained parameters.
        group: ranks that load the same checkpoint at the same time; they share the work of
            verifying it, and all of them fail if one does. None = this process by itself.

    Returns:
        The number of finished steps.

    Raises:
        IntegrityError: the directory is damaged, of another format, or of another model.
    """
    ranks = group or Ranks(ranks=(0,), rank=0, group=None)
    verify_together(directory, ranks)
    return load_verified(directory, module, optimizer, ranks)


def verify_together(directory: Path, ranks: Ranks) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte is as it was written. Called on all ranks.

    Raises:
        IntegrityError: it is damaged, or its format is not ours; the same on all ranks.
    """

    def verify() -> dict[str, Any]:
        manifest = verify_manifest(directory)
        verify_large_files(directory, manifest, ranks.index, ranks.size)
        if manifest.get("format") != FORMAT:
            raise IntegrityError(
                f"{directory} has checkpoint format {manifest.get('format')}, not {FORMAT}",
                hint=f"it was written by vlactl {manifest.get('vlactl')}, "
                f"and this is vlactl {__version__}",
            )
        return manifest

    return together(ranks, verify)[0]


def load_verified(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> int:
    """As `load_checkpoint`, of what `verify_together` has found good. Called on all ranks."""
    manifest = together(ranks, lambda: read_manifest(directory))[0]
    if FROZEN in manifest["files"]:
        prints = fingerprints(module)
        together(ranks, lambda: _check_frozen(directory, prints))
    trained_only = bool(manifest.get("trained_only"))

    def read() -> None:
        state = checkpoint_state(module, optimizer, trained_only=trained_only)
        _read_shards(directory, state)
        if optimizer is not None:
            load_optimizer_state(module, optimizer, state["optimizer"])

    together(ranks, read)
    return int(manifest["step"])


def _read_shards(directory: Path, state: State) -> None:
    """Read what this rank needs into the tensors of `state`; no collectives."""
    reader = _SafeReader(directory)
    _check_fits(directory, state, reader.read_metadata())
    try:
        load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise IntegrityError(f"{directory} cannot be read: {_cause(error)}") from error


def _cause(failed: CheckpointException) -> str:
    """What went wrong on the first rank that failed; torch says it with everybody's traceback."""
    index, (error, _) = min(failed.failures.items(), key=lambda item: item[0])
    return f"actor {index}: {describe(error)}" if index else describe(error)


def _tensors(state: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _map_tensors(
    state: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    return {
        name: _map_tensors(value, change) if isinstance(value, Mapping) else change(value)
        for name, value in state.items()
    }


class _Writer(FileSystemWriter):
    """Says that the disk is full, where torch says that it cannot end the file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error


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


def _check_fits(directory: Path, state: State, metadata: Metadata) -> None:
    """Compare names and shapes of all that is wanted before anything is read."""
    stored = {
        name: tuple(item.size)
        for name, item in metadata.state_dict_metadata.items()
        if name.partition(".")[0] in state and isinstance(item, TensorStorageMetadata)
    }
    wanted = dict(_shapes(state))
    problems = [
        *(f"{name}: missing" for name in sorted(wanted.keys() - stored.keys())),
        *(f"{name}: unexpected" for name in sorted(stored.keys() - wanted.keys())),
        *(
            f"{name}: stored {stored[name]}, wanted {wanted[name]}"
            for name in sorted(stored.keys() & wanted.keys())
            if stored[name] != wanted[name]
        ),
    ]
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise IntegrityError(
            f"{directory} is of another model: {len(problems)} of its tensors differ\n"
            + "\n".join([*problems[:LISTED], *more]),
            hint="evaluate or resume with the configuration that the run was started with",
        )


def _shapes(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names as torch writes them, and shapes of whole tensors."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _shapes(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value.shape)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of all weights, as they are held: names, types, shapes and every bit.

    Equal weights have equal hashes wherever they came from. The module must not be sharded.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(module: nn.Module) -> dict[str, str]:
    """Hashes of some numbers of every frozen parameter, at the precision that all dtypes share.

    Sharded parameters are gathered, one by one: called on all ranks that share them.
    """
    prints = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            flat = whole(parameter.detach()).flatten()
            some = flat[:: max(1, len(flat) // SAMPLED)].bfloat16().float().cpu().numpy()
            prints[name] = hashlib.blake2b(some.tobytes(), digest_size=8).hexdigest()
    return prints


def _check_frozen(directory: Path, present: Mapping[str, str]) -> None:
    """Adapters belong to the weights that they were trained beside.

    Quantised weights have no fingerprint, so what both sides have is compared.
    """
    stored = json.loads((directory / FROZEN).read_text())
    other = sorted(name for name in stored.keys() & present.keys() if stored[name] != present[name])
    if other:
        raise IntegrityError(
            f"{directory} holds adapters of another model: {len(other)} frozen weights differ, "
            f"such as {other[0]}",
            hint="set model.path to the directory that the run started from",
        )
