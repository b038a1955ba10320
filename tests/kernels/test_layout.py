"""An op is a folder: nothing but the public ``__init__`` and what builds on an op names it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import gardo_kernels

PACKAGE = Path(gardo_kernels.__file__).parent
OPS = sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py"))


def test_shared_modules_name_no_op():
    named = {}
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name == "__init__.py":
            continue
        found = re.findall(r"gardo_kernels\.ops\.(\w+)|ops/(\w+)", path.read_text())
        named[path.name] = {name for pair in found for name in pair if name in OPS}
    assert not {name: found for name, found in named.items() if found}


@pytest.mark.parametrize("op", OPS)
def test_the_backends_of_an_op_are_its_files(op):
    backends = getattr(importlib.import_module(f"gardo_kernels.ops.{op}"), "BACKENDS", {})
    files = {path.stem for path in (PACKAGE / "ops" / op).glob("*.py")}
    assert set(backends) <= files
    assert {"native", "triton", "reference", "faiss"} & files == set(backends)


def test_no_module_is_private():
    modules = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    private = [str(path) for path in modules if re.match(r"_(?!_)", path.name)]
    assert not private
