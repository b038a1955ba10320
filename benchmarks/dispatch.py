"""``python -m benchmarks.dispatch [CHECKOUT ...]``: Python time of a call at batch 1.

What a GPU waits for outside of graphs. Latents are tiny, so that a call is Python and dispatch. The
checkouts (this one, without any) take turns in processes of their own, on one thread, since what
else the machine does changes from minute to minute; the table has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CALLS, REPEATS = 300, 7


def measure() -> dict[str, float]:
    """Microseconds a call of the ``gardo_kernels`` that Python finds."""
    import torch

    import gardo_kernels as gk

    torch.set_num_threads(1)
    x, z, ref = (torch.randn(1, 16, 8, 8) for _ in range(3))
    v = torch.randn(x.shape, requires_grad=True)
    coef, seed = gk.sde_coefficients(0.6, 0.5), torch.tensor([3])
    with torch.no_grad():
        step = gk.sde_step(v, x, coef, noise=z)
    row, gate = torch.ones(1), torch.ones(1, dtype=torch.bool)
    features, ids = torch.randn(1, 64), torch.zeros(1, dtype=torch.int64)

    def sde_step() -> None:
        with torch.no_grad():
            gk.sde_step(v, x, coef, seed=seed)

    def grpo_loss() -> None:
        out = gk.grpo_loss(
            *(v, x, step.prev_sample, step.log_prob, row, coef),
            gate=gate,
            ref_velocity=ref,
            kl_coef=0.1,
        )
        out.loss.backward()
        v.grad = None

    def nearest_neighbor() -> None:
        gk.nearest_neighbor_distance(features, ids)

    calls = {
        "sde_step": sde_step,
        "grpo_loss forward + backward": grpo_loss,
        "nearest_neighbor_distance": nearest_neighbor,
    }
    return {name: _microseconds(call) for name, call in calls.items()}


def _microseconds(call: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[1:])


def _in(checkout: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "kernels"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--once"]
    done = subprocess.run(
        command, env=environment, cwd=checkout, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__)
    parser.add_argument("checkout", nargs="*", type=Path, default=[HERE])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure()))
        return
    rounds = [[_in(path) for path in arguments.checkout] for _ in range(arguments.rounds)]
    print("microseconds a call, median (lowest)", *map(str, arguments.checkout), sep=" | ")
    for name in rounds[0][0]:
        columns = [[found[name] for found in column] for column in zip(*rounds, strict=True)]
        cells = (f"{statistics.median(c):.1f} ({min(c):.1f})" for c in columns)
        print(name, *cells, sep=" | ")


if __name__ == "__main__":
    main()
