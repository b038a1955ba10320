"""GARDO: online RL fine-tuning of text-to-image flow models without reward hacking.

Importing the package is light; its modules import torch and diffusers when they are needed.
"""

from importlib.util import find_spec
from pathlib import Path


def __getattr__(name: str) -> str:
    if name == "__version__":  # the kernels' is the only one
        from gardo_kernels import __version__

        return __version__
    raise AttributeError(f"module 'gardo' has no attribute {name!r}")


def _check_kernels() -> None:
    """A checkout runs with its own kernels; an installed `gardo-kernels` would go before them."""
    own = Path(__file__).resolve().parents[1] / "kernels" / "gardo_kernels"
    found = find_spec("gardo_kernels")
    if not own.is_dir() or found is None or found.origin is None:
        return
    used = Path(found.origin).resolve().parent
    if used != own:
        raise ImportError(
            f"gardo_kernels: expected that of the checkout, '{own}', got '{used}'. "
            "Run: pip uninstall gardo-kernels, then pip install -e . in the checkout"
        )


_check_kernels()
