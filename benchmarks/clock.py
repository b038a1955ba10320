"""Seconds and peak memory of the stages of an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STAGES = ("prompts", "sample", "decode", "score", "shape", "reference", "update")
ROLLOUT = ("prompts", "sample", "decode", "score")
TRAINING = ("reference", "update")


class StageClock:
    """Times stages, or, with ``memory``, notes how much memory they need instead.

    The device is idle when a stage begins and ends. Memory is measured in an epoch of its own,
    because that takes time: on a GPU the most that torch held of the device, with nothing kept for
    later when the stage began (weights and the pools of CUDA graphs are part of it); on a CPU the
    most that torch allocated beyond what was there when the stage began.
    """

    def __init__(self, device: torch.device, memory: bool = False) -> None:
        self.device = device
        self.memory = memory
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.peak_bytes = dict.fromkeys(STAGES, 0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the block to a stage; one that is entered again is summed."""
        with self._peak(name):
            self._wait()
            started = time.perf_counter()
            yield
            self._wait()
            self.seconds[name] += time.perf_counter() - started

    @contextmanager
    def _peak(self, name: str) -> Iterator[None]:
        if not self.memory:
            yield
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            peak = torch.cuda.max_memory_reserved(self.device)
        else:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profiler:
                yield
            peak = _most_at_once(profiler)
        self.peak_bytes[name] = max(self.peak_bytes[name], peak)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def epoch(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def rollout(self) -> float:
        """Seconds until the last sample is scored."""
        return sum(self.seconds[name] for name in ROLLOUT)

    @property
    def training(self) -> float:
        """Seconds of reference and updates."""
        return sum(self.seconds[name] for name in TRAINING)


def _most_at_once(profiler: Any) -> int:
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
