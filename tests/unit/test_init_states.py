"""Files of initial states: nothing in them is executed, and whatever is wrong is said."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile

import numpy as np
import pytest
from vlactl_libero.init_states import (
    count_states,
    find_init_file,
    read_state,
    read_states,
    sampled_seed,
)

from vlactl.errors import IntegrityError

STATES = np.arange(12.0).reshape(3, 4)


class _Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _original(path, value):
    """A file as the original LIBERO distributes them: a zip archive with one old pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/version", "3\n")
    return path


def _converted(path, value):
    np.savez_compressed(path, states=value)
    return path


@pytest.fixture
def original(tmp_path):
    return _original(tmp_path / "task.pruned_init", STATES)


@pytest.fixture
def converted(tmp_path):
    return _converted(tmp_path / "task.pruned_init.npz", STATES)


@pytest.mark.parametrize("form", ["original", "converted"])
def test_states_of_both_forms(request, form):
    path = request.getfixturevalue(form)
    np.testing.assert_array_equal(read_states(path), STATES)
    np.testing.assert_array_equal(read_state(path, 2), STATES[2])
    assert count_states(path) == 3
    assert not read_state(path, 0).flags.writeable


def test_converted_files_are_preferred(original, converted):
    assert find_init_file(original.parent, "task") == converted
    converted.unlink()
    assert find_init_file(original.parent, "task") == original


@pytest.mark.parametrize(
    "module_of_multiarray", ["numpy.core.multiarray", "numpy._core.multiarray"]
)
def test_arrays_of_old_and_new_numpy_are_read(tmp_path, module_of_multiarray):
    text = pickle.dumps(STATES, protocol=2)
    text = text.replace(b"numpy._core.multiarray", module_of_multiarray.encode())
    path = tmp_path / "task.pruned_init"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)
    np.testing.assert_array_equal(read_states(path), STATES)


@pytest.mark.parametrize("read", [read_states, count_states])
def test_code_in_a_file_is_named_and_not_run(tmp_path, read):
    import os

    witness = tmp_path / "executed"
    path = _original(tmp_path / "bad.pruned_init", _Call(os.system, f"touch {witness}"))
    with pytest.raises(IntegrityError, match=r"(posix|os)\.system is not allowed") as caught:
        read(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 5
    assert not witness.exists()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1 + 1",), "builtins.eval|__builtin__.eval"),
        (np.load, ("x",), "numpy.load"),
        (getattr, (np.ndarray, "tofile"), "builtins.getattr|__builtin__.getattr"),
    ],
)
def test_harmless_looking_calls_are_not_allowed_either(tmp_path, function, arguments, name):
    path = _original(tmp_path / "bad.pruned_init", [STATES, _Call(function, *arguments)])
    with pytest.raises(IntegrityError, match=f"({name}) is not allowed in an init-state file"):
        read_states(path)


def test_only_latin1_is_encoded(tmp_path):
    import _codecs

    path = _original(tmp_path / "bad.pruned_init", _Call(_codecs.encode, "x", "rot13"))
    with pytest.raises(IntegrityError, match="rot13"):
        read_states(path)


def test_pickled_objects_in_an_npz_are_refused(tmp_path):
    path = _converted(tmp_path / "bad.npz", np.array([[{}]], dtype=object))
    with pytest.raises(IntegrityError, match=r"bad\.npz"):
        read_states(path)


@pytest.mark.parametrize("form", ["original", "converted"])
def test_truncated_file(request, form):
    path = request.getfixturevalue(form)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        short = path.with_name(f"short-{length}{path.suffix}")
        short.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match=short.name):
            read_states(short)
        with pytest.raises(IntegrityError, match=short.name):
            count_states(short)


@pytest.mark.parametrize("form", ["original", "converted"])
def test_damaged_bytes_never_raise_anything_else(request, form):
    path = request.getfixturevalue(form)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for trial in range(200):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 3):
            damaged[position] = generator.integers(256)
        other = path.with_name(f"damaged-{trial}{path.suffix}")
        other.write_bytes(damaged)
        with contextlib.suppress(IntegrityError):
            assert read_states(other).dtype == np.float64


@pytest.mark.parametrize("write", [_original, _converted])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (STATES.astype(np.float32), "float32"),
        (STATES.astype(np.int64), "int64"),
        (STATES[0], r"shape \(4,\)"),
        (np.array([["a"]]), "<U1"),
    ],
)
def test_wrong_arrays(tmp_path, write, value, problem):
    path = write(tmp_path / ("wrong.npz" if write is _converted else "wrong.pruned_init"), value)
    for read in (read_states, count_states):
        with pytest.raises(IntegrityError, match=problem) as caught:
            read(path)
        assert str(path) in caught.value.message


def test_no_states(tmp_path):
    path = _converted(tmp_path / "empty.npz", STATES[:0])
    for read in (read_states, count_states):
        with pytest.raises(IntegrityError, match=r"empty\.npz has 0 initial states"):
            read(path)


def test_something_else_than_an_array(tmp_path):
    path = _original(tmp_path / "wrong.pruned_init", [1, 2, 3])
    with pytest.raises(IntegrityError, match="list instead of an array"):
        read_states(path)


def test_archive_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "bomb.pruned_init"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**27))
    with pytest.raises(IntegrityError, match="unpacks to 134217728 bytes"):
        read_states(path)


def test_array_that_claims_to_be_huge(tmp_path):
    path = _original(tmp_path / "huge.pruned_init", _Call(np.ndarray, (2**40, 2**10)))
    with pytest.raises(IntegrityError, match="huge"):
        read_states(path)


@pytest.mark.parametrize("trial", [-1, 3])
def test_trial_that_is_not_there(original, trial):
    with pytest.raises(IntegrityError, match="has 3 initial states") as caught:
        read_state(original, trial)
    assert str(original) in caught.value.message


def test_missing_file(tmp_path):
    with pytest.raises(IntegrityError, match="is missing"):
        count_states(tmp_path / "none.npz")


def test_header_alone_is_not_believed(tmp_path):
    """The count comes from the header; reading checks it against the data."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f8", "fortran_order": False, "shape": (1000, 4)}
    )
    path = tmp_path / "liar.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("states.npy", buffer.getvalue() + STATES.tobytes())
    with pytest.raises(IntegrityError, match=r"liar\.npz"):
        read_states(path)


def test_seeds_of_sampled_states_are_the_same_in_every_run():
    assert sampled_seed("turn_on_the_stove", 50) == 4804125468807647502
    assert sampled_seed("turn_on_the_stove", 51) != sampled_seed("open_the_drawer", 51)
