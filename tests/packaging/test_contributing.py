"""The worked examples of CONTRIBUTING.md apply together, touch the files they list, and work.

They are tried in a copy of the checkout. An addition that takes more than the project promises
fails here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from gardo_kernels import core

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KERNELS = "kernels/gardo_kernels"


class Takes(NamedTuple):
    """What an addition may take: a pattern for each new file, and the lines that others get."""

    new: Sequence[str]
    edited: Mapping[str, int]


DESCRIPTOR = 28  # lines of a model family's, which is no mere line in a table
TAKES = {
    "A reward": Takes(["gardo/rewards/*.py"], {"gardo/rewards/registry.py": 1}),
    "A prompt source": Takes(["gardo/data/generators/*.py"], {"gardo/config/generators.py": 1}),
    "A model family": Takes(
        ["gardo/models/*.py", "gardo/recipes/*.yaml"], {"gardo/families.py": DESCRIPTOR}
    ),
    "An algorithm": Takes(
        ["gardo/algorithms/*.py"],
        # of the registry: the import, too
        {"gardo/algorithms/registry.py": 2, "gardo/config/traits.py": 1},
    ),
    "An op": Takes(
        [
            *("csrc/bindings/*.cpp", "csrc/cpu/*.cpp", "csrc/include/*.h"),
            *(
                f"{KERNELS}/ops/latent_rms/{name}.py"
                for name in ("__init__", "native", "reference")
            ),
        ],
        {f"{KERNELS}/__init__.py": 2},  # its import, and its name in `__all__`
    ),
    "A backend": Takes([f"{KERNELS}/ops/*/*.py"], {}),
}
OF_THE_KERNELS = ("An op", "A backend")


class Example(NamedTuple):
    """A section: its list of files with whether each is new, its patch, and what uses that."""

    listed: dict[str, bool]
    patch: str
    code: str

    @property
    def added(self) -> dict[str, tuple[bool, int]]:
        """Files of the patch: whether they are new, and how many lines they get."""
        found = {}
        for part in re.split(r"^--- ", self.patch, flags=re.MULTILINE)[1:]:
            before, after, *lines = part.splitlines()
            count = sum(line.startswith("+") for line in lines)
            found[after.removeprefix("+++ b/")] = (before == "/dev/null", count)
        return found


def _examples() -> dict[str, Example]:
    found = {}
    for section in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        listed = re.findall(r"^- `(.+?)` \((new|edited)\)", body, re.MULTILINE)
        (patch,) = re.findall(r"^```diff\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        (code,) = re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        found[title] = Example({path: kind == "new" for path, kind in listed}, patch, code)
    return found


EXAMPLES = _examples()


def _run(folder: Path, *command: str | Path, **env: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _script(title: str) -> str:
    return title.lower().replace(" ", "_") + ".py"


def _work(folder: Path, titles: Sequence[str]) -> None:
    """Run what uses the examples in one process, which spares the imports."""
    run = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path)"
    _run(folder, sys.executable, "-c", run, *(f"examples/{_script(title)}" for title in titles))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout and its C++ core, with all patches applied."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the tracked files are unknown")
    folder = tmp_path_factory.mktemp("contributing") / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    native = importlib.util.find_spec("gardo_kernels._C")
    if native is not None and native.origin is not None:
        shutil.copy(native.origin, folder / KERNELS)
    (folder / "examples").mkdir()
    for title, example in EXAMPLES.items():
        patch = folder / "examples" / f"{_script(title)}.patch"
        patch.write_text(example.patch, encoding="utf-8")
        # outside of any repository `git apply` works like `patch`
        _run(folder, "git", "apply", patch, GIT_CEILING_DIRECTORIES=str(folder.parent))
        (folder / "examples" / _script(title)).write_text(example.code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def kernels(checkout: Path) -> Path:
    """The kernels, with a C++ core of the example's op alone: seconds instead of a minute."""
    if not core.is_available():
        pytest.skip(f"the C++ core cannot be built anew: {core.unavailable_reason()}")
    folder = checkout.with_name("kernels")
    for name in ("kernels", "csrc", "examples"):
        shutil.copytree(checkout / name, folder / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt"):
        shutil.copy(checkout / name, folder)
    kept = {"csrc/bindings/module.cpp", *EXAMPLES["An op"].listed}
    for source in (folder / "csrc").glob("*/*.cpp"):
        if str(source.relative_to(folder)) not in kept:
            source.unlink()
    quick = {"GARDO_CUDA": "off", "GARDO_NO_NATIVE": "0", "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug"}
    _run(folder, sys.executable, "setup.py", "build_ext", "--inplace", **quick)
    return folder


def test_each_addition_has_its_example_and_its_line_in_the_table() -> None:
    assert set(EXAMPLES) == set(TAKES)
    linked = re.findall(r"^\| \[.+?\]\(#(.+?)\)", TEXT, re.MULTILINE)
    assert linked == [title.lower().replace(" ", "-") for title in EXAMPLES]


@pytest.mark.parametrize("title", TAKES)
def test_an_example_touches_the_files_that_it_lists(title: str) -> None:
    example = EXAMPLES[title]
    assert {path: new for path, (new, _) in example.added.items()} == example.listed


@pytest.mark.parametrize("title", TAKES)
def test_an_addition_takes_no_more_than_promised(title: str) -> None:
    added, takes = EXAMPLES[title].added, TAKES[title]
    new = sorted(path for path, (is_new, _) in added.items() if is_new)
    assert len(new) == len(takes.new)
    for path, pattern in zip(new, takes.new, strict=True):
        assert fnmatch(path, pattern)
    assert {path: lines for path, (is_new, lines) in added.items() if not is_new} == takes.edited


@pytest.mark.slow
def test_the_examples_of_the_library_work(checkout: Path) -> None:
    _work(checkout, [title for title in EXAMPLES if title not in OF_THE_KERNELS])


@pytest.mark.slow
def test_the_examples_of_the_kernels_work(kernels: Path) -> None:
    _work(kernels, OF_THE_KERNELS)


def _linter(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install -e '.[lint]')")
    return found


def _touched(*suffixes: str) -> list[str]:
    paths = {path for example in EXAMPLES.values() for path in example.listed}
    return sorted(path for path in paths if path.endswith(suffixes))


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check"])
def test_the_examples_pass_ruff(checkout: Path, command: str) -> None:
    name, *arguments = command.split()
    _run(checkout, _linter(name), *arguments, *_touched(".py"), "examples")


def test_the_examples_pass_clang_format(checkout: Path) -> None:
    _run(checkout, _linter("clang-format"), "--dry-run", "-Werror", *_touched(".cpp", ".h"))


def test_the_imports_of_the_examples_point_one_way(checkout: Path) -> None:
    _run(checkout, _linter("lint-imports"), "--no-cache")


@pytest.mark.slow
def test_the_examples_pass_mypy(checkout: Path) -> None:
    if (ROOT / ".mypy_cache").is_dir():  # what was checked there need not be again
        shutil.copytree(ROOT / ".mypy_cache", checkout / ".mypy_cache")
    _run(checkout, _linter("mypy"), *_touched(".py"))
