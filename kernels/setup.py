"""Builds the C++ core (`gardo_kernels._C`) with CMake; all metadata is in pyproject.toml.

In a checkout the C++ sources stand in the folder above; the sdist takes them in. The setup.py of
the folder above builds the core with this file, too.

Environment switches:

- ``GARDO_NO_NATIVE=1`` installs without the C++ core (no compiler needed).
- ``GARDO_CUDA=auto|on|off`` builds the CUDA part: when nvcc is found (default), always, never.
- ``CMAKE_ARGS`` is passed to CMake as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
SOURCES = HERE if (HERE / "CMakeLists.txt").is_file() else HERE.parent
NO_NATIVE = "GARDO_NO_NATIVE"
CUDA_CHOICES = ("auto", "on", "off")


class CMakeExtension(Extension):
    """An extension whose sources are known to CMake alone."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds one CMake target per extension, into the place setuptools expects."""

    def run(self) -> None:
        if self.extensions and not _has_compiler():
            raise SystemExit(_advice("no C++ compiler was found"))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        build_type = "Debug" if self.debug else "Release"
        configure = [
            _cmake(), "-S", str(SOURCES), "-B", str(build_dir),
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_pybind11_cmake_dir()}",
            f"-DGARDO_CUDA={_cuda_choice()}",
            *_generator(build_dir),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = str(self.parallel or os.cpu_count() or 1)
        build = [_cmake(), "--build", str(build_dir), "--target", "_C", "--parallel", jobs]
        for command in (configure, build):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(_advice("CMake failed, see its messages above"))
        if not output.is_file():
            raise SystemExit(_advice(f"CMake did not produce {output}"))


def _advice(problem: str) -> str:
    return (
        f"\ngardo: the C++ core could not be built: {problem}.\n"
        "It needs a C++17 compiler (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++).\n"
        f"To install without it: {NO_NATIVE}=1 pip install ...  (the CPU kernels then run in "
        "plain PyTorch, slower)\n"
    )


def _cmake() -> str:
    found = shutil.which("cmake")
    if found is None:
        raise SystemExit(_advice("cmake was not found (pip install cmake ninja pybind11)"))
    return found


def _pybind11_cmake_dir() -> str:
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit(_advice("pybind11 was not found (pip install cmake ninja pybind11)"))
    import pybind11

    return str(pybind11.get_cmake_dir())


def _cuda_choice() -> str:
    choice = os.environ.get("GARDO_CUDA", "auto").lower()
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"GARDO_CUDA: expected one of {', '.join(CUDA_CHOICES)}, got {choice!r}")
    return choice.upper()


def _generator(build_dir: Path) -> list[str]:
    """Ninja where present; the path is given because an isolated build moves it each time."""
    if (build_dir / "CMakeCache.txt").exists():
        # A cache from another build environment names programs that are gone.
        shutil.rmtree(build_dir)
        build_dir.mkdir(parents=True)
    ninja = shutil.which("ninja")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []


def _has_compiler() -> bool:
    """True where a compiler is set or found; on Windows CMake finds it by itself."""
    names = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    names += ["c++", "g++", "clang++"]
    return os.name == "nt" or any(shutil.which(name) for name in names)


def extensions() -> list[Extension]:
    """The C++ core, unless it is switched off."""
    if os.environ.get(NO_NATIVE, "0").lower() not in ("", "0", "false", "no"):
        return []
    return [CMakeExtension("gardo_kernels._C")]


class SourceDistribution(sdist):
    """Takes in the C++ sources, so that the sdist builds by itself."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copy(SOURCES / "CMakeLists.txt", base_dir)
        shutil.copytree(SOURCES / "csrc", Path(base_dir) / "csrc")


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": CMakeBuild, "sdist": SourceDistribution},
    )
