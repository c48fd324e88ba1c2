"""Where LIBERO's compiled functions are kept: by version, and somewhere in any case."""

from __future__ import annotations

import stat
from importlib import metadata
from pathlib import Path

import pytest
from vlactl_libero import environment, rendering
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.rendering import Graphics

GRAPHICS = Graphics(errors={"libOSMesa.so.8": "", "libOSMesa.so.6": ""}, egl_devices=[])


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch):
    """A process that has not asked yet and whose user has set nothing."""
    monkeypatch.setattr(rendering, "probe", lambda: GRAPHICS)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    environment._cache_folder.cache_clear()
    yield
    environment._cache_folder.cache_clear()


def cache_folder() -> Path:
    return Path(environment.simulator_variables(LiberoConfig(), -1)["NUMBA_CACHE_DIR"])


@pytest.mark.parametrize(
    ("variable", "place"), [("HOME", ".cache/vlactl"), ("XDG_CACHE_HOME", "vlactl")]
)
def test_folder_names_the_versions_that_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, place: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    folder = cache_folder()
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    assert folder.parent == tmp_path / place
    assert f"robosuite-{metadata.version('robosuite')}" in folder.name
    assert f"numba-{metadata.version('numba')}" in folder.name
    assert cache_folder() == folder


def test_home_that_cannot_be_written_to_is_replaced_by_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    environment._temporary_folder.cache_clear()
    folder = cache_folder()
    assert cache_folder() == folder
    assert list((tmp_path / "tmp").iterdir()) == [folder]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IRWXU
    environment._temporary_folder().cleanup()
    environment._temporary_folder.cache_clear()


def test_folder_of_the_user_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert list(tmp_path.iterdir()) == []
