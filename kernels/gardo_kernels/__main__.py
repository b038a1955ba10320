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
from gardo_kernels import _backends, _native
from gardo_kernels.ops import grpo_loss, nearest_neighbor, nft_loss, sde, shape_rewards, win_rate

# Largest error, relative to the largest element of each output, that counts as right: all outputs
# are computed in float32 or better from the same inputs.
TOLERANCE = 1e-4
_REPEATS = 9


class Check(NamedTuple):
    """An op at a size of use: ``run(backend, dtype)`` gives its outputs."""

    op: str
    backends: dict[str, _backends.Availability]
    run: Callable[[str, torch.dtype], tuple[Tensor, ...]]


def checks(device: torch.device) -> list[Check]:
    """One check per op: SD3.5 latents at 512x512, and an epoch of 48 prompts of 24 images."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    v, u, ref, x, z = (normal(9, 16, 64, 64) for _ in range(5))
    advantage, t = normal(9), torch.linspace(0.1, 0.9, 9, device=device)
    gate = torch.arange(9, device=device) % 2 == 0
    table = gk.sde_coefficients(0.6, 0.5).to(device)
    prev = gk.sde_step(v, x, table, noise=z, backend="reference").prev_sample
    old = gk.sde_log_prob(v + 0.01 * u, x, prev, table, backend="reference")
    ids = torch.arange(1152, device=device) % 48
    rewards, features = normal(3, 1152), normal(1152, 1024)

    def step(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return gk.sde_step(
            *(v.to(dtype), x.to(dtype), table),
            noise=z.to(dtype),
            velocity_uncond=u.to(dtype),
            guidance_scale=4.5,
            backend=backend,
        )

    def log_prob(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (gk.sde_log_prob(v.to(dtype), x.to(dtype), prev.to(dtype), table, backend=backend),)

    def grpo(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        velocity = v.to(dtype).requires_grad_()
        latents = (velocity, x.to(dtype), prev.to(dtype))
        out = gk.grpo_loss(
            *(*latents, old.to(dtype), advantage.to(dtype), table),
            clip_range=0.1,
            gate=gate,
            ref_velocity=ref.to(dtype),
            kl_coef=0.04,
            backend=backend,
        )
        return out.loss, out.ratio, *torch.autograd.grad(out.loss, velocity)

    def nft(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        velocity = v.to(dtype).requires_grad_()
        out = gk.nft_loss(
            *(velocity, u.to(dtype), x.to(dtype), prev.to(dtype), t.to(dtype)),
            advantage.to(dtype),
            gate=gate,
            ref_velocity=ref.to(dtype),
            kl_coef=0.04,
            backend=backend,
        )
        return out.loss, *torch.autograd.grad(out.loss, velocity)

    def wins(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (gk.win_rate(rewards, ids, backend=backend),)

    def neighbor(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (gk.nearest_neighbor_distance(features, ids, backend=backend),)

    def shape(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out = gk.shape_rewards(rewards[0], rewards[1:], ids, backend=backend)
        return out.advantage, out.uncertainty, out.gate.to(torch.float32)

    return [
        Check("sde_step", sde.BACKENDS, step),
        Check("sde_log_prob", sde.BACKENDS, log_prob),
        Check("grpo_loss", grpo_loss.BACKENDS, grpo),
        Check("nft_loss", nft_loss.BACKENDS, nft),
        Check("win_rate", win_rate.BACKENDS, wins),
        Check("nearest_neighbor_distance", nearest_neighbor.BACKENDS, neighbor),
        Check("shape_rewards", shape_rewards.BACKENDS, shape),
    ]


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
    native = _native.unavailable_reason() or (
        "OpenMP" if _native.has_openmp() else "no OpenMP: one thread"
    )
    triton = importlib.util.find_spec("triton")
    faiss = importlib.util.find_spec("faiss")
    return [
        f"gardo_kernels {gk.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, {cuda}",
        f"C++ core: {native}",
        f"C++ core on CUDA: {_native.cuda_unavailable_reason() or 'built'}",
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
