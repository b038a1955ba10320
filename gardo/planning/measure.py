"""Rates of the actual model on this machine, from a few rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from gardo.config import Config
from gardo.distributed.process import resolve_device
from gardo.models.adapters import build_adapters
from gardo.models.embeddings import EmbeddingTable
from gardo.models.loading import DTYPES, load_model
from gardo.planning.counts import EpochCounts
from gardo.planning.estimate import Rates
from gardo.sampling.rollout import Sampler
from gardo.types import UserError

REPEATS = 3


def measure_rates(config: Config, counts: EpochCounts) -> Rates:
    """Load the model and time forwards, forwards with backward, and decoding.

    One warm-up and the median of three repetitions each, with the configuration's batch sizes.

    Raises:
        UserError: the model cannot be loaded, or fp16 without a GPU.
    """
    device = torch.device(resolve_device(config.device))
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_model(config.model, device, config.precision)
    resolution = config.sampling.resolution or model.default_resolution
    prompt = "a photo of a red circle"
    embeddings = EmbeddingTable(model, [prompt])
    model.release_text_encoders()
    build_adapters(model, config.model, seed=0)
    sampler = Sampler(
        model, embeddings, resolution, config.sampling.guidance_scale, config.sampling.batch_size
    )
    timesteps = model.schedule(config.sampling.num_steps, resolution).timesteps.to(device)
    shape = model.latent_shape(resolution)

    def batch(size: int) -> torch.Tensor:
        return torch.randn(size, *shape, device=device)

    def forward(latents: torch.Tensor) -> torch.Tensor:
        size = len(latents)
        return sampler.velocity(latents, timesteps[0].expand(size), [prompt] * size).guided

    rollout, training = batch(counts.rollout_batch), batch(counts.train_batch)

    def sample() -> None:
        with torch.no_grad():
            forward(rollout)

    def train() -> None:
        forward(training).square().mean().backward()

    seconds = [_time(call, device) for call in (sample, train, lambda: model.decode(rollout))]
    rows = counts.rows_per_sample
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return Rates(
        forward=counts.rollout_batch * rows / seconds[0],
        train=counts.train_batch * rows / seconds[1],
        decode=counts.rollout_batch / seconds[2],
        source=(
            f"measured on this machine ({where}{threads}), median of {REPEATS} repetitions of one "
            f"batch, {str(DTYPES[config.precision]).removeprefix('torch.')}"
        ),
    )


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])
