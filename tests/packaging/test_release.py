"""The two distributions of a release, gardo and gardo-kernels: `python -m build` of both folders.

They are built from a copy whose version was changed in the one place where it stands, without the
C++ core; CI's step "sdists and wheels" builds them with it.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "9.8.7"


class Distribution(NamedTuple):
    """An sdist, names without its top folder, and the wheel that was built from it."""

    sdist: dict[str, bytes]
    wheel: dict[str, bytes]
    wheel_name: str

    def metadata(self) -> dict[str, Message]:
        (name,) = (n for n in self.wheel if n.endswith(".dist-info/METADATA"))
        return {
            "sdist": message_from_bytes(self.sdist["PKG-INFO"]),
            "wheel": message_from_bytes(self.wheel[name]),
        }


def _read_sdist(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name.partition("/")[2], file.read()


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory,
    copy_checkout: Callable[[Path], None],
    run_python: Callable[..., None],
) -> Callable[[str], Distribution]:
    folder = tmp_path_factory.mktemp("release")
    copy_checkout(folder / "source")
    init = folder / "source" / "kernels" / "gardo_kernels" / "__init__.py"
    lines = re.sub('(?m)^__version__ = ".*"$', f'__version__ = "{VERSION}"', init.read_text())
    init.write_text(lines)

    def run(name: str) -> Distribution:
        out = folder / f"dist-{name or 'gardo'}"
        run_python(folder / "source" / name, "-m", "build", "--no-isolation", "--outdir", str(out))
        (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            held = {member: archive.read(member) for member in archive.namelist()}
        return Distribution(dict(_read_sdist(sdist)), held, wheel.name)

    return run


@pytest.fixture(scope="module")
def gardo(build: Callable[[str], Distribution]) -> Distribution:
    return build("")


@pytest.fixture(scope="module")
def kernels(build: Callable[[str], Distribution]) -> Distribution:
    return build("kernels")


def _base_requirements(metadata: Message) -> set[str]:
    return {r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r}


def _packages(distribution: Distribution) -> set[str]:
    tops = {name.split("/")[0] for name in distribution.wheel}
    return {top for top in tops if not top.endswith(".dist-info")}


def _tracked(folder: Path) -> set[str]:
    """Files that git tracks below a folder, relative to it."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=folder, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the tracked files are unknown")
    return set(listed.stdout.split())


def test_one_version_for_both(gardo: Distribution, kernels: Distribution) -> None:
    for distribution in (gardo, kernels):
        for metadata in distribution.metadata().values():
            assert metadata["Version"] == VERSION
    assert f'__version__ = "{VERSION}"' in kernels.wheel["gardo_kernels/__init__.py"].decode()


def test_gardo_requires_the_kernels_of_its_version(gardo: Distribution) -> None:
    for metadata in gardo.metadata().values():
        assert f"gardo-kernels=={VERSION}" in _base_requirements(metadata)


def test_gardo_is_plain_python_without_the_kernels(gardo: Distribution) -> None:
    assert gardo.wheel_name == f"gardo-{VERSION}-py3-none-any.whl"
    assert _packages(gardo) == {"gardo"}
    tops = {name.split("/")[0] for name in gardo.sdist}
    assert not tops & {"kernels", "csrc", "CMakeLists.txt"}


def test_gardo_holds_every_tracked_file(gardo: Distribution) -> None:
    tracked = {f"gardo/{name}" for name in _tracked(ROOT / "gardo")}
    assert sorted(tracked - set(gardo.sdist)) == []
    assert sorted(tracked - set(gardo.wheel)) == []


def test_kernels_require_torch_alone(kernels: Distribution) -> None:
    for metadata in kernels.metadata().values():
        (requirement,) = _base_requirements(metadata)
        assert re.fullmatch(r"torch>=[\d.]+", requirement)


def test_kernels_hold_every_tracked_file(kernels: Distribution) -> None:
    assert _packages(kernels) == {"gardo_kernels"}
    tracked = {f"gardo_kernels/{name}" for name in _tracked(ROOT / "kernels" / "gardo_kernels")}
    assert sorted(tracked - set(kernels.wheel)) == []
    sources = {f"csrc/{name}" for name in _tracked(ROOT / "csrc")}
    assert sorted((tracked | sources | {"CMakeLists.txt"}) - set(kernels.sdist)) == []


def test_kernels_describe_themselves(kernels: Distribution) -> None:
    readme = (ROOT / "kernels" / "README.md").read_text()
    for metadata in kernels.metadata().values():
        assert metadata["Description-Content-Type"] == "text/markdown"
        assert str(metadata.get_payload()).strip() == readme.strip()


def test_each_holds_the_licence(gardo: Distribution, kernels: Distribution) -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    for distribution in (gardo, kernels):
        (name,) = (n for n in distribution.wheel if n.endswith(".dist-info/licenses/LICENSE"))
        assert distribution.wheel[name] == distribution.sdist["LICENSE"] == licence


def test_both_need_the_same_to_build() -> None:
    needs = [
        re.findall("(?m)^requires = .*$", (ROOT / folder / "pyproject.toml").read_text())
        for folder in (".", "kernels")
    ]
    assert len(needs[0]) == 1
    assert needs[0] == needs[1]
