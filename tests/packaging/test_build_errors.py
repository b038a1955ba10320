"""A build without a compiler says what to do, in one message."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Build = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=[".", "kernels"])
def build_ext(
    request: pytest.FixtureRequest, tmp_path: Path, copy_checkout: Callable[[Path], None]
) -> Build:
    """Builds the C++ core from the checkout, for both distributions."""

    def build(**env: str) -> subprocess.CompletedProcess[str]:
        copy_checkout(tmp_path / "source")
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out")],
            cwd=tmp_path / "source" / request.param,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return build


@pytest.fixture
def nothing(tmp_path: Path) -> str:
    """A PATH without programs."""
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


def test_no_compiler_names_the_switch(build_ext: Build, nothing: str) -> None:
    done = build_ext(PATH=nothing, CXX="")
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr
    assert "GARDO_NO_NATIVE=1" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_native_builds_nothing(build_ext: Build, nothing: str, tmp_path: Path) -> None:
    done = build_ext(PATH=nothing, CXX="", GARDO_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "out").rglob("_C*"))


def test_unknown_cuda_choice_is_refused(build_ext: Build) -> None:
    done = build_ext(GARDO_CUDA="maybe")
    assert done.returncode != 0
    assert "GARDO_CUDA: expected one of auto, on, off, got 'maybe'" in done.stderr


def test_cmake_args_reach_cmake(build_ext: Build) -> None:
    done = build_ext(CMAKE_ARGS="--no-such-option")
    assert done.returncode != 0
    assert "--no-such-option" in done.stderr
    assert "CMake failed" in done.stderr
