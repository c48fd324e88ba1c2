"""Initial states of LIBERO's tasks: float64 [trials, 1 + nq + nv], one simulator state per row.

They are official, i.e. read from the task's file, or (`env.sampled_trials`) drawn from the task's
own sampler with the seed of their trial.

The package ships them as `.npz`; the original LIBERO distributes pickles in a zip archive. A pickle
can name any function to be called while it is read, so those are read by an unpickler that knows
the handful of names that a numpy array needs and calls nothing else. Whatever is wrong with a file
ends in an `IntegrityError` that names it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.lib import format as npy

from vlactl.api.noise import make_key
from vlactl.errors import IntegrityError

MAX_BYTES = 64 * 2**20  # the largest published file unpacks to less than 0.2 MiB


def find_init_file(folder: Path, task_name: str) -> Path:
    """Where a task's initial states are: converted if there is such a file, else the original."""
    converted = folder / f"{task_name}.pruned_init.npz"
    original = folder / f"{task_name}.pruned_init"
    return original if original.is_file() and not converted.is_file() else converted


def read_state(path: Path, trial: int) -> np.ndarray:
    """One initial state, float64 [1 + nq + nv].

    Raises:
        IntegrityError: the file is damaged or unsafe, or has no such trial.
    """
    states = read_states(path)
    if not 0 <= trial < len(states):
        raise IntegrityError(f"{path} has {len(states)} initial states: there is no trial {trial}")
    state: np.ndarray = states[trial]
    return state


def sampled_seed(task_name: str, trial: int) -> int:
    """What a sampled initial state and its fixtures are drawn with: the same in every run."""
    return make_key("libero_sampled_state", task_name, trial)


@cache
def read_states(path: Path) -> np.ndarray:
    """All initial states of a file; read once per process, and not writable.

    Raises:
        IntegrityError: the file is damaged or unsafe.
    """
    with _naming(path):
        states = _read_npz(path) if path.suffix == ".npz" else _read_pickle(path)
    _check(path, states.dtype, states.shape)
    states.flags.writeable = False
    return states


@cache
def count_states(path: Path) -> int:
    """Number of initial states; from the header alone where the format has one.

    Raises:
        IntegrityError: the file is damaged or unsafe.
    """
    if path.suffix != ".npz":
        return len(read_states(path))
    with _naming(path), zipfile.ZipFile(path) as archive, archive.open("states.npy") as file:
        shape, _, dtype = _read_header(file)
    _check(path, dtype, shape)
    return shape[0]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever damaged bytes make the readers raise into one error that names the file."""
    try:
        yield
    except IntegrityError:
        raise
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing", hint="reinstall LIBERO") from None
    except Exception as error:
        raise IntegrityError(
            f"{path} is not a file of initial states: {type(error).__name__}: {error}",
            hint="reinstall LIBERO",
        ) from error


def _check(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.float64 or len(shape) != 2:
        raise IntegrityError(
            f"{path} holds {dtype} of shape {shape}: float64 [trials, state] was expected"
        )
    if 0 in shape:
        raise IntegrityError(f"{path} has 0 initial states (shape {shape})")


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    info = archive.getinfo(name)
    if info.file_size > MAX_BYTES:
        raise ValueError(f"{name} unpacks to {info.file_size} bytes, more than {MAX_BYTES}")
    return info


def _read_npz(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        _member(archive, "states.npy")
    with np.load(path, allow_pickle=False) as arrays:
        states: np.ndarray = arrays["states"]
    return states


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    return npy.read_array_header_2_0(file)


def _read_pickle(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} pickles in the archive instead of one")
        with archive.open(_member(archive, pickles[0])) as file:
            states = _ArrayUnpickler(file, path).load()
    if not isinstance(states, np.ndarray):
        raise TypeError(f"{type(states).__name__} instead of an array")
    return states


def _encode(text: str, encoding: str) -> bytes:
    """Old pickles carry bytes as text: they ask for exactly this call."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else."""

    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = self._ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise IntegrityError(
                f"{module_name}.{global_name} is not allowed in an init-state file: {self._path}",
                hint="the file would run code when read: do not use it, reinstall LIBERO",
            )
        return allowed
