"""Sampling alone: one batch of trajectories, eager, as a CUDA graph, compiled, by attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.official_epoch import OfficialEpoch
from benchmarks.workload import EPOCH, Workload
from gardo.models.attention import set_attention_backend
from gardo.sampling.graph import GraphedTrajectories
from gardo.sampling.rollout import noise_source
from gardo.types import UserError

BACKENDS = ("_native_cudnn", "flash", "_flash_3")
"""Exact attention kernels for GPUs, by diffusers' names; quantised ones change the samples."""

Batch = Callable[[], object]


def baseline_batch(work: Workload, official: OfficialEpoch) -> Batch:
    """Samples one batch the published way."""
    prompts = _prompts(work)
    cond = work.embeddings(prompts)
    start = torch.randn(len(prompts), *work.sampler().latent_shape, device=work.device)
    return lambda: official.sample(start, cond)


def our_batch(work: Workload, graph: bool) -> Batch:
    """Samples one batch with the library."""
    prompts, sampler = _prompts(work), work.sampler(graphs=GraphedTrajectories() if graph else None)
    shape = (work.table.num_steps + 1, len(prompts), *sampler.latent_shape)
    latents = torch.randn(shape, device=work.device)

    def sample() -> None:
        sources = [
            noise_source(work.config.seed, EPOCH, i, work.device) for i in range(len(prompts))
        ]
        sampler.run(work.table, prompts, latents, noise_sources=sources)

    return sample


def time_variants(work: Workload, repeats: int, prefix: str) -> list[dict[str, Any]]:
    """The library's sampler with and without CUDA graph, and with each attention kernel.

    Args:
        prefix: what to call the transformer's blocks: ``eager`` or ``compiled``.

    Returns:
        entries as of `time_in_turns`, or ``variant`` and ``problem`` for an attention backend that
        cannot be used here. Attention is PyTorch's own at the end.
    """
    entries = time_in_turns(work, repeats, {prefix: our_batch(work, graph=False)})
    if work.device.type != "cuda":
        return entries
    graphed = f"{prefix}, CUDA graph"
    entries += time_in_turns(work, repeats, {graphed: our_batch(work, graph=True)})
    for backend in BACKENDS:
        variant = f"{graphed}, attention {backend}"
        if work.dtype == torch.float32:
            entries.append({"variant": variant, "problem": "it computes in bf16 and fp16 alone"})
            continue
        try:
            set_attention_backend(work.model.transformer, backend)
        except UserError as error:
            entries.append({"variant": variant, "problem": str(error)})
            continue
        entries += time_in_turns(work, repeats, {variant: our_batch(work, graph=True)})
    set_attention_backend(work.model.transformer, "sdpa")
    return entries


def time_in_turns(
    work: Workload, repeats: int, variants: Mapping[str, Batch]
) -> list[dict[str, Any]]:
    """Median seconds of each variant's batch, after two for compilation and capture.

    Returns:
        an entry of ``variant``, ``images`` and ``seconds`` each.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 2):
        for name, sample in variants.items():
            _wait(work)
            started = time.perf_counter()
            sample()
            _wait(work)
            times[name].append(time.perf_counter() - started)
    images = len(_prompts(work))
    return [
        {"variant": name, "images": images, "seconds": median(seconds[2:])}
        for name, seconds in times.items()
    ]


def _prompts(work: Workload) -> list[str]:
    index = work.plan.prompt_index.tolist()
    return [work.texts[i] for i in index[: work.plan.batch_size(work.config.sampling.batch_size)]]


def _wait(work: Workload) -> None:
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
