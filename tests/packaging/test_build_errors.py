"""A build without a compiler says what to do, in one message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _build_ext(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source / name)
    if (ROOT / "README.md").exists():
        shutil.copy(ROOT / "README.md", source / "README.md")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / "kernels" / "gardo_kernels").mkdir(parents=True)
    (source / "kernels" / "gardo_kernels" / "__init__.py").touch()
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out")],
        cwd=source,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_compiler_names_the_switch(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = _build_ext(tmp_path, PATH=str(empty), CXX="")
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr
    assert "GARDO_NO_NATIVE=1" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_native_builds_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = _build_ext(tmp_path, PATH=str(empty), CXX="", GARDO_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "out").rglob("_C*"))


def test_unknown_cuda_choice_is_refused(tmp_path: Path) -> None:
    done = _build_ext(tmp_path, GARDO_CUDA="maybe")
    assert done.returncode != 0
    assert "GARDO_CUDA: expected one of auto, on, off, got 'maybe'" in done.stderr
