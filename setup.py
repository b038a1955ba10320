"""What the distribution `gardo` holds and needs; the rest of its metadata is in pyproject.toml.

- In a checkout, `kernels/` stands beside this file: an install takes `gardo_kernels` in and builds
  its C++ core (kernels/setup.py, which has the environment switches), so it needs no index for it.
- A release is built from the sdist (`python -m build`), which leaves `kernels/` and `csrc/` out:
  `gardo` alone, in plain Python, that requires gardo-kernels of its own version.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "kernels"
IS_CHECKOUT = KERNELS.is_dir()

DEPENDENCIES = [
    # Triton is not listed: the CUDA builds of torch bring the version that they were built for.
    "torch>=2.8",
    "diffusers>=0.37",
    "transformers>=5.0",
    "peft>=0.18",
    "accelerate>=1.10",
    "safetensors>=0.5",
    "huggingface_hub>=1.0",
    "numpy>=1.26",
    "pillow>=10.0",
    "matplotlib>=3.8",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "jinja2>=3.1",
    "tqdm>=4.66",
]


def _version() -> str:
    """That of the kernels beside, which the metadata of an sdist repeats."""
    if IS_CHECKOUT:
        source = (KERNELS / "gardo_kernels" / "__init__.py").read_text("utf-8")
        found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    else:
        found = re.search(r"^Version: (.+)$", (ROOT / "PKG-INFO").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("gardo: no version in kernels/gardo_kernels/__init__.py or PKG-INFO")
    return found[1]


VERSION = _version()
RELEASE_DEPENDENCIES = [*DEPENDENCIES, f"gardo-kernels=={VERSION}"]
GARDO = find_packages(include=["gardo", "gardo.*"])


class SourceDistribution(sdist):
    """The source of a release: its metadata are the release's, not the checkout's."""

    def run(self) -> None:
        distribution = self.distribution
        distribution.install_requires = RELEASE_DEPENDENCIES
        distribution.metadata.install_requires = RELEASE_DEPENDENCIES
        super().run()


def _kernels_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_setup", KERNELS / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if IS_CHECKOUT:
    build = _kernels_build()
    setup(
        version=VERSION,
        install_requires=DEPENDENCIES,
        packages=GARDO + find_packages("kernels"),
        package_dir={"gardo_kernels": "kernels/gardo_kernels"},
        ext_modules=build.extensions(),
        cmdclass={"build_ext": build.CMakeBuild, "sdist": SourceDistribution},
    )
else:
    setup(version=VERSION, install_requires=RELEASE_DEPENDENCIES, packages=GARDO)
