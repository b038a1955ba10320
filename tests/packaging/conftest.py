"""Copies of what is built, so that no test leaves anything in the tree or meets leftovers there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt"),
    *("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"),
)
LEFTOVERS = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", "*.so")


@pytest.fixture(scope="session")
def copy_checkout() -> Callable[[Path], None]:
    """Copies what a build reads from the checkout into a folder."""

    def copy(folder: Path) -> None:
        folder.mkdir()
        for name in FILES:
            shutil.copy(ROOT / name, folder)
        for name in ("csrc", "kernels", "gardo"):
            shutil.copytree(ROOT / name, folder / name, ignore=LEFTOVERS)

    return copy


@pytest.fixture(scope="session")
def run_python() -> Callable[..., None]:
    """Runs Python on a module or file in a folder, without the C++ core; fails with its output."""

    def run(folder: Path, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "GARDO_NO_NATIVE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run
