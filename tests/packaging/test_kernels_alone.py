"""`gardo_kernels` where torch alone is installed, and beside a checkout of gardo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Hides all packages but torch, what torch requires, and gardo_kernels: they are not installed.
TORCH_ALONE = """
import importlib.metadata as metadata, re, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

def normal(name):
    return name.lower().replace("_", "-")

held, left = set(), ["torch"]
while left:
    name = normal(re.match(r"[\\w.-]+", left.pop())[0])
    if name in held:
        continue
    held.add(name)
    try:
        left += [r for r in metadata.requires(name) or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        pass  # asked for on other systems
hidden = {
    package
    for package, names in metadata.packages_distributions().items()
    if not held & set(map(normal, names))
} - {"gardo_kernels"}

class NotHidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, NotHidden]
for name in [n for n in sys.modules if n.partition(".")[0] in hidden]:
    del sys.modules[name]
sys.path.insert(0, sys.argv.pop(1))
"""

EVERYTHING = """
import importlib, pkgutil, runpy
from types import SimpleNamespace

for name in ("numpy", "diffusers", "transformers", "faiss", "gardo"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is visible")

import torch
from gardo_kernels import compat
modules = {m.name: importlib.import_module(f"gardo_kernels.compat.{m.name}")
           for m in pkgutil.iter_modules(compat.__path__)}

sigmas = torch.linspace(1, 0, 5)
x, v = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
scheduler = SimpleNamespace(sigmas=sigmas, index_for_timestep=lambda t: int(t))
flow_grpo = modules["flow_grpo"]
prev, log_prob, *_ = flow_grpo.sde_step_with_logprob(scheduler, v, 1, x)
again = flow_grpo.sde_step_with_logprob(scheduler, v, 1, x, prev_sample=prev)[1]
assert torch.equal(log_prob, again)
modules["dance_grpo"].flux_step(v, x, 0.3, sigmas, 1, None, True, True)
tracker = flow_grpo.PerPromptStatTracker(global_std=True)
for kind in ("grpo", "gardo", "rwr", "sft", "dpo"):
    assert len(tracker.update(["a", "b", "a", "b"], [1.0, 2.0, 3.0, 4.0], type=kind)) == 4
print("compat: all of it ran")

sys.argv = ["gardo_kernels", "--device", "cpu"]
runpy.run_module("gardo_kernels", run_name="__main__", alter_sys=True)
"""


def _run_with_torch_alone(tmp_path: Path, code: str) -> str:
    script = tmp_path / "torch_alone.py"
    script.write_text(TORCH_ALONE + code)
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(ROOT / "kernels")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_and_compat_run_with_torch_alone(tmp_path: Path) -> None:
    printed = _run_with_torch_alone(tmp_path, EVERYTHING)
    assert "compat: all of it ran" in printed
    assert "every available backend is right" in printed


def test_the_example_of_the_readme_runs_with_torch_alone(tmp_path: Path) -> None:
    readme = (ROOT / "kernels" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "done" in _run_with_torch_alone(tmp_path, example + "\nprint('done')")


def _import_gardo(tmp_path: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import gardo; print(gardo.__version__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )


def _fake_kernels(folder: Path) -> Path:
    (folder / "gardo_kernels").mkdir(parents=True)
    (folder / "gardo_kernels" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    return folder


def test_a_checkout_refuses_kernels_from_elsewhere(tmp_path: Path) -> None:
    other = _fake_kernels(tmp_path / "site-packages")
    done = _import_gardo(tmp_path, other, ROOT)
    assert done.returncode == 1
    assert f"expected that of the checkout, '{ROOT / 'kernels' / 'gardo_kernels'}'" in done.stderr
    assert f"got '{other / 'gardo_kernels'}'" in done.stderr
    assert "pip uninstall gardo-kernels" in done.stderr


def test_a_release_takes_the_kernels_beside_it_and_their_version(tmp_path: Path) -> None:
    folder = _fake_kernels(tmp_path / "site-packages")
    (folder / "gardo").mkdir()
    (folder / "gardo" / "__init__.py").write_text((ROOT / "gardo" / "__init__.py").read_text())
    done = _import_gardo(tmp_path, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9.8.7"
