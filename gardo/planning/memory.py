"""An estimate of the GPU memory that each stage of a run needs at its highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gardo.algorithms.registry import ALGORITHMS
from gardo.config import Config
from gardo.families import Architecture
from gardo.models.adapters import BEHAVIOUR
from gardo.models.architectures import Counts
from gardo.planning.counts import EpochCounts
from gardo.planning.simulation import DecodeCosts, SampleCosts
from gardo.rewards.registry import declared_backbones

GIB = 2**30
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# CUDA context, cuBLAS and cuDNN workspaces; an assumption
CONTEXT_BYTES = int(1.0 * GIB)
# share of what torch allocates that the caching allocator cannot use; an assumption
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Item:
    """Something that occupies memory through the whole run, in bytes."""

    name: str
    bytes: float


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU.

    Attributes:
        items: what stays through the run.
        stages: highest use in each stage, everything included.
        embedding_bytes: of one prompt's embeddings.
    """

    items: Sequence[Item]
    stages: dict[str, float]
    embedding_bytes: int

    @property
    def peak(self) -> float:
        return max(self.stages.values())

    @property
    def worst_stage(self) -> str:
        return max(self.stages, key=self.stages.__getitem__)


def estimate_memory(
    config: Config,
    architecture: Architecture,
    parameters: Counts,
    counts: EpochCounts,
    sample: SampleCosts,
    decode: DecodeCosts,
    prompts: int,
) -> MemoryEstimate:
    """Estimate the memory of one process.

    Args:
        prompts: distinct prompts of the run.
    """
    frozen = [
        Item("image decoder", parameters.vae * BYTES[config.model.vae_dtype or "fp32"]),
        *reward_items(config),
        Item("prompt embeddings", prompts * embedding_bytes(config, architecture)),
    ]
    latent = 4 * sample.latent_values
    trajectory = (config.sampling.num_steps + 1) * latent
    offload = config.sampling.offload_trajectories
    kept = counts.rollout_batch if offload else counts.samples_per_process
    gated = round(counts.samples_per_process * counts.gated_share)
    during = [
        *_weights(config, parameters, sample.trainable, counts.processes),
        *frozen,
        Item("trajectories", kept * trajectory),
        Item("behaviour velocities", counts.behaviour_rows / counts.processes * latent),
        Item("reference velocities", 0 if offload else counts.trained_steps * gated * latent),
    ]
    working = counts.rollout_batch * sample.forward_bytes
    if config.sampling.cuda_graph != "off":
        during.append(Item("CUDA graph", working + counts.rollout_batch * trajectory))
    held = _total(during)
    # no adapters and no optimizer yet, but the text encoders
    loaded = parameters.transformer + parameters.buffers + parameters.text_encoders
    training = counts.train_batch * activation_bytes(config, sample)
    stages = {
        "loading, with text encoders": loaded * BYTES[config.precision] + _total(frozen),
        "rollout": held + working,
        "decoding": held + decode.bytes,
        "training": held + training,
    }
    return MemoryEstimate(
        items=[item for item in during if item.bytes],
        stages={n: b * (1 + FRAGMENTATION) + CONTEXT_BYTES for n, b in stages.items()},
        embedding_bytes=embedding_bytes(config, architecture),
    )


def activation_bytes(config: Config, sample: SampleCosts) -> int:
    """What a training forward and backward hold at their highest, per sample.

    With checkpointing the blocks' inputs are kept and one block at a time is computed again.
    """
    if config.model.gradient_checkpointing:
        saved = sample.saved_bytes_checkpointed + sample.block_bytes
    else:
        saved = sample.saved_bytes
    return saved + sample.train_transient_bytes


def embedding_bytes(config: Config, architecture: Architecture) -> int:
    """Bytes of one prompt's embeddings, in the precision of the encoders."""
    shapes = architecture.prompt_shapes(config.model.max_sequence_length)
    return sum(map(prod, shapes.values())) * BYTES[config.precision]


def reward_items(config: Config) -> list[Item]:
    """Backbones that the rewards and the extractor declare, each once; servers have their own."""
    rewards = config.rewards
    names = {*rewards.proxy_weights, *rewards.aux, *rewards.eval} - rewards.servers.keys()
    backbones = declared_backbones(sorted(names), rewards.features)
    return [Item(backbone.name, backbone.bytes) for backbone in backbones]


def _weights(config: Config, parameters: Counts, trainable: int, processes: int) -> list[Item]:
    """Transformer, adapters and what the optimizer keeps: gradients and two moments in float32."""
    names = [
        "behaviour policy" if name == BEHAVIOUR else name
        for name in ALGORITHMS[config.algorithm.name].adapter_names
    ]
    policies, copied = len(names), f"{', '.join(names[:-1])} and {names[-1]}"
    average = 4 * trainable if config.train.ema else 0
    # DDP keeps its own buckets of gradients
    buckets = 4 * trainable if processes > 1 else 0
    if config.model.full_finetune:
        copies = policies * 4 * (parameters.transformer + parameters.buffers)
        low = parameters.transformer * BYTES[config.precision] if config.precision != "fp32" else 0
        weights = [
            Item(f"{copied}, fp32", copies),
            Item(f"autocast copies, {config.precision}", low),
        ]
    else:
        total = parameters.transformer + parameters.buffers
        weights = [
            Item(f"transformer, {config.precision}", total * BYTES[config.precision]),
            Item(f"LoRA of {copied}", policies * 4 * trainable),
        ]
    return [
        *weights,
        Item("average of the weights", average),
        Item("gradients and AdamW", 12 * trainable + buckets),
    ]


def _total(items: Sequence[Item]) -> float:
    return sum(item.bytes for item in items)
