"""``python -m gardo_kernels``: which backend of which op works here, how exactly and how fast."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo_kernels import core, ops
from gardo_kernels.backends import Availability

# Largest error, relative to the largest element of each output, that counts as right: all outputs
# are computed in float32 or better from the same inputs.
TOLERANCE = 1e-4
_REPEATS = 9


class Check(NamedTuple):
    """An op at a size of use: ``run(backend, dtype)`` gives its outputs."""

    op: str
    backends: dict[str, Availability]
    run: Callable[[str, torch.dtype], tuple[Tensor, ...]]


def checks(device: torch.device) -> list[Check]:
    """What the ``self_check`` modules of the ops declare."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    found = []
    for module in ops.modules("self_check"):
        generator = torch.Generator().manual_seed(0)
        op = sys.modules[module.__name__.rpartition(".")[0]]
        found += [Check(name, op.BACKENDS, run) for name, run in module.checks(normal).items()]
    return found


def relative_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest error of any output, relative to that output's largest element; inf for NaN."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).abs().max() / b.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def median_time(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after one to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[_REPEATS // 2]


def environment() -> list[str]:
    """What the backends depend on, one line each."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    native = core.unavailable_reason() or (
        "OpenMP" if core.has_openmp() else "no OpenMP: one thread"
    )
    triton = importlib.util.find_spec("triton")
    faiss = importlib.util.find_spec("faiss")
    return [
        f"gardo_kernels {gk.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, {cuda}",
        f"C++ core: {native}",
        f"C++ core on CUDA: {core.cuda_unavailable_reason() or 'built'}",
        f"triton: {'installed' if triton else 'not installed'}; "
        f"faiss: {'installed' if faiss else 'not installed'}",
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if an available backend gives a wrong result."""
    parser = _Parser(prog="python -m gardo_kernels", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    name = parser.parse_args(argv).device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    print("\n".join(environment()))
    print(f"\n{'op':27}{'backend':11}{'max error':>10}{'time':>11}   on {device}")
    wrong = 0
    for check in checks(device):
        expected = check.run("reference", torch.float64)
        for backend, unavailable in check.backends.items():
            reason = unavailable(device, torch.float32)
            if reason is not None:
                print(f"{check.op:27}{backend:11}{'-':>10}{'-':>11}   {reason}")
                continue
            error = relative_error(check.run(backend, torch.float32), expected)
            seconds = median_time(lambda: check.run(backend, torch.float32), device)  # noqa: B023
            wrong += error > TOLERANCE
            verdict = "WRONG" if error > TOLERANCE else "ok"
            print(f"{check.op:27}{backend:11}{error:10.1e}{seconds * 1e3:8.2f} ms   {verdict}")
    print(f"\n{wrong} wrong results" if wrong else "\nevery available backend is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
