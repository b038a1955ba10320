"""What every benchmark shares: device, copy bandwidth of this run, checks before timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gardo_kernels as gk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COPY_BYTES = 256 << 20
# Rounds of a benchmark: half a second of them, which outlasts what else the machine has to do, but
# no fewer and no more than these (of calls that take a second, no fewer than three).
SECONDS, MIN_ROUNDS, MIN_LONG_ROUNDS, MAX_ROUNDS = 0.5, 5, 3, 2000


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def velocity_dtype() -> torch.dtype:
    """What a transformer gives: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of the fastest of ten 256 MiB copies."""
    source = torch.ones(_COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * _COPY_BYTES / best


@pytest.fixture
def measure(benchmark: Any, copy_bandwidth: float) -> Callable[..., None]:
    """Time ``run`` and note the minimal bytes, the bandwidth and the peak memory it takes."""

    def go(run: Callable[[], Any], group: str, variant: str, least_bytes: int) -> None:
        def synchronized() -> None:
            run()
            synchronize()

        benchmark.group = group
        peak = peak_bytes(synchronized)
        once = duration(synchronized)
        least = MIN_ROUNDS if once < 1.0 else MIN_LONG_ROUNDS
        rounds = min(max(least, int(SECONDS / once)), MAX_ROUNDS)
        # The calls above have warmed up what a slow form needs.
        warmup_rounds = 3 if once < SECONDS else 0
        benchmark.pedantic(synchronized, rounds=rounds, iterations=1, warmup_rounds=warmup_rounds)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            device=DEVICE,
            threads=torch.get_num_threads(),
            variant=variant,
            least_mib=least_bytes / 2**20,
            gb_per_s=least_bytes / seconds / 1e9,
            copy_fraction=least_bytes / seconds / copy_bandwidth,
            copy_gb_per_s=copy_bandwidth / 1e9,
            peak_mib=peak / 2**20,
        )

    return go


def duration(run: Callable[[], Any]) -> float:
    """Seconds of one call: the median of three, or the first if it is long."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that torch allocated at once during a call, beyond what was there before."""
    run()
    gk.empty_cache()  # what a call keeps for the next one counts, too
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
