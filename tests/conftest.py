"""Fixtures shared by all levels."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# MuJoCo loads OSMesa's LLVM for all to see, and a triton that comes later takes it for its own: a
# segmentation fault. The ranks of a run have no MuJoCo, and its simulators have no triton.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

# MuJoCo reads them when it is imported, by whichever test of this process is the first to do so.
os.environ |= {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}

# What a shell starts in the background ignores Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

FakeDistribution = Callable[..., Path]


@pytest.fixture
def fake_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDistribution:
    """Install a distribution that consists of metadata and a few files: all that plugins need.

    The folder is on `sys.path` for this test, and on PYTHONPATH for the processes that it starts.
    """
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    monkeypatch.setenv("PYTHONPATH", str(root))

    def install(
        name: str,
        entry_points: dict[str, dict[str, str]],
        files: dict[str, str],
        version: str = "1.0",
    ) -> Path:
        info = root / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        sections = [
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
            for group, entries in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(sections))
        for path, text in files.items():
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return root

    return install
