"""The whole estimate of a configuration: counts, memory, time."""

from __future__ import annotations

from dataclasses import dataclass

from gardo.config import Config
from gardo.data.prompts import load_prompts
from gardo.families import FAMILIES, Architecture
from gardo.models.architectures import Counts, architecture_of, count_parameters
from gardo.planning.counts import EpochCounts, count_epoch
from gardo.planning.memory import MemoryEstimate, estimate_memory
from gardo.planning.rates import GPU
from gardo.planning.simulation import DecodeCosts, SampleCosts, simulate, simulate_decode
from gardo.types import UserError


@dataclass(frozen=True)
class Rates:
    """Rows and images per second of one process, and where the numbers come from.

    Attributes:
        forward: transformer rows per second without gradient.
        train: rows per second, forward and backward.
        decode: images per second.
        source: in words.
    """

    forward: float
    train: float
    decode: float
    source: str


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of an epoch's stages; rewards and start-up are not among them."""

    stages: dict[str, float]

    @property
    def epoch(self) -> float:
        return sum(self.stages.values())


class Planner:
    """Estimates configurations of one model; what is simulated once is used for all variants."""

    def __init__(self, config: Config, processes: int) -> None:
        """Raises UserError for a model whose architecture is not known, or wrong LoRA targets."""
        self.config = config
        self.processes = processes
        self.architecture: Architecture = architecture_of(config.model)
        self.parameters: Counts = count_parameters(self.architecture)
        self.sample: SampleCosts = simulate(config, self.architecture)
        self.prompts, self.prompts_known = count_prompts(config)
        self._decoded: dict[tuple[object, ...], DecodeCosts] = {}

    def counts(self, config: Config) -> EpochCounts:
        """Samples, rows and batches of an epoch."""
        return count_epoch(config, self.processes, FAMILIES[self.architecture.family])

    def decode(self, config: Config) -> DecodeCosts:
        """Costs of decoding a rollout batch with the configuration's options."""
        model, batch = config.model, self.counts(config).rollout_batch
        key = (model.vae_dtype, model.vae_tiling, model.vae_slicing, batch)
        if key not in self._decoded:
            self._decoded[key] = simulate_decode(config, self.architecture, batch)
        return self._decoded[key]

    def memory(self, config: Config) -> MemoryEstimate:
        """Memory of one process. ``config`` may differ from the planner's in batches and options.

        LoRA, precision, guidance and resolution must be the planner's.
        """
        sample = self.sample
        if config.model.full_finetune != self.config.model.full_finetune:
            sample = simulate(config, self.architecture)
        return estimate_memory(
            config,
            self.architecture,
            self.parameters,
            self.counts(config),
            sample,
            self.decode(config),
            self.prompts,
        )

    def tabulated_rates(self, gpu: GPU, utilization: float) -> Rates:
        """Rates from counted FLOPs, a GPU's data sheet and an assumed utilization."""
        config, sample = self.config, self.sample
        peak = gpu.flops(config.precision) * utilization
        recomputed = sample.forward_flops if config.model.gradient_checkpointing else 0
        work = sample.forward_flops + sample.backward_flops + recomputed
        decoder = gpu.convolution_flops(config.model.vae_dtype) * utilization
        return Rates(
            forward=peak / sample.forward_flops,
            train=peak / work,
            decode=decoder / self.decode(config).flops,
            source=(
                f"counted FLOPs at an assumed {utilization:.0%} of the data sheet's "
                f"{gpu.flops(config.precision) / 1e12:.0f} TFLOP/s ({gpu.name}, "
                f"{config.precision}); not measured, and too fast for small models"
            ),
        )

    def time(self, rates: Rates) -> TimeEstimate:
        """Seconds of an epoch at these rates, the processes in parallel."""
        counts, n = self.counts(self.config), self.processes
        return TimeEstimate(
            {
                "rollout": counts.rollout_rows / n / rates.forward,
                "decoding": counts.samples / n / rates.decode,
                "reference": (counts.behaviour_rows + counts.reference_rows) / n / rates.forward,
                "training": counts.train_rows / n / rates.train,
            }
        )


def count_prompts(config: Config) -> tuple[int, bool]:
    """Distinct prompts of the run; those of one epoch, and False, where they cannot be read."""
    if config.prompts.path is None and config.prompts.generator is None:
        return config.prompts.per_epoch, False  # a data set of the hub is not downloaded for this
    try:
        return len(load_prompts(config.prompts)), True
    except UserError:
        return config.prompts.per_epoch, False
