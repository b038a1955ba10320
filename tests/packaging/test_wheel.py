"""What an install from a checkout contains, and what it asks for."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torchvision", "timm", "open-clip-torch", "open_clip_torch", "mmcv", "deepspeed"}


@pytest.fixture(scope="module")
def wheel(
    tmp_path_factory: pytest.TempPathFactory,
    copy_checkout: Callable[[Path], None],
    run_python: Callable[..., None],
) -> zipfile.ZipFile:
    """A wheel built from this tree, without the C++ core (seconds instead of a minute)."""
    out = tmp_path_factory.mktemp("wheel")
    copy_checkout(out / "source")
    run_python(
        *(out, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--wheel-dir", str(out), str(out / "source")),
    )
    (path,) = out.glob("gardo-*.whl")
    return zipfile.ZipFile(path)


def tracked_data() -> list[str]:
    """Data files of the `gardo` package that git tracks: what a user must get."""
    listed = subprocess.run(
        ["git", "ls-files", "gardo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the tracked data files are unknown")
    return [name for name in listed.stdout.split() if not name.endswith(".py")]


def test_wheel_holds_every_tracked_data_file(wheel: zipfile.ZipFile) -> None:
    missing = sorted(set(tracked_data()) - set(wheel.namelist()))
    assert missing == []


def test_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"gardo", "gardo_kernels"}
    assert "gardo/__init__.py" in wheel.namelist()
    assert "gardo_kernels/__init__.py" in wheel.namelist()


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    kernels = ROOT / "kernels"
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "gardo").rglob("*.py")}
    modules |= {str(p.relative_to(kernels)) for p in (kernels / "gardo_kernels").rglob("*.py")}
    assert sorted(modules - set(wheel.namelist())) == []


def test_without_native_the_wheel_is_pure(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if "/_C." in name and name.endswith(".so")]


def test_base_dependencies_are_light(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    requires = message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []
    base = {
        r.split(";")[0].split(">")[0].split("=")[0].strip() for r in requires if "extra" not in r
    }
    assert "torch" in base
    assert not base & HEAVY
    assert "triton" not in base  # torch's CUDA builds bring the one that they were built for
    assert "gardo-kernels" not in base  # it is in the wheel: no index is asked for it


def test_kernels_folder_is_not_a_package() -> None:
    # Hugging Face's `kernels` package would be shadowed in the working directory.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_constraints_hold_pins_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name, pin
        assert version, pin
        assert "/" not in pin, f"a path or URL: {pin}"
