"""One epoch's work, ready to be done by this library or the published way: model and settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import stand_ins
from gardo.config import Config, load_config
from gardo.data.prompts import PromptSampler, load_prompts
from gardo.distributed.process import Runtime
from gardo.families import FAMILIES, Architecture
from gardo.models.adapters import POLICY, LoraAdapters
from gardo.models.architectures import build_transformer, build_vae
from gardo.models.base import Schedule
from gardo.models.embeddings import EmbeddingTable
from gardo.models.loading import DTYPES, configure, load_model, model_class
from gardo.models.pipeline import PipelineModel
from gardo.rewards.scoring import RewardSet
from gardo.rng import derive_seed
from gardo.sampling.plan import EpochPlan, plan_epoch
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import StepTable, sde_window, step_table
from gardo.types import Prompt, UserError

RECIPES = {
    "sd35-medium": "sd35-medium-geneval-1gpu-80gb",
    "flux1-dev": "flux1-dev-hps",
    "tiny": "tiny",
}
# A GPU of eight has 144 of the 1152 samples of a published epoch. Times are proportional to the
# number of samples, so a part of them gives the same ratios in minutes.
SIZES = {"sd35-medium": (3, 12), "flux1-dev": (3, 8), "tiny": (8, 16)}
EPOCH = 0
SPREAD = 0.02  # of the policy's second LoRA matrices, so that it differs from its reference


def settings(
    model: str, *, random_weights: bool, gated: float, overrides: Sequence[tuple[str, str]] = ()
) -> Config:
    """The recipe of a model with the benchmark's size, gate and rewards.

    Args:
        model: sd35-medium, flux1-dev or tiny.
        random_weights: no rewards that look at images, either.
        gated: share of the samples that carries the KL penalty; it does not adapt.
        overrides: ``(key, value)`` pairs that win over everything.

    Raises:
        UserError: unknown model, a share that the gate cannot reach, a value that does not fit.
    """
    if model not in RECIPES:
        raise UserError(f"--model: expected one of {', '.join(RECIPES)}, got '{model}'")
    prompts, group_size = SIZES[model]
    pairs = [("prompts.per_epoch", str(prompts)), ("prompts.group_size", str(group_size))]
    pairs += [("rewards.eval", "[]"), ("algorithm.gate.adaptive", "false")]
    pairs += _gate(gated)
    if random_weights or model != "tiny":
        stand_in = f"{stand_ins.__name__}:"
        pairs += [("rewards.proxy", stand_in + "proxy")]
        pairs += [("rewards.aux", f"[{stand_in}first, {stand_in}second]")]
        pairs += [("rewards.features", stand_in + "Features")]
    config = load_config(RECIPES[model], overrides=[*pairs, *overrides])
    if config.precision == "fp16":
        raise UserError("--precision: expected fp32 or bf16, got 'fp16'")
    return config


def _gate(gated: float) -> list[tuple[str, str]]:
    if gated in (0.0, 1.0):
        return [("algorithm.gate.mode", "all" if gated else "off")]
    # only samples with U >= 0, about half of them, can be gated
    if not 0.0 < gated <= 0.4:
        raise UserError(f"--gated: expected 0, 1 or a share up to 0.4, got {gated:g}")
    gate = {"mode": "paper", "share_of": "all", "fraction": str(gated)}
    return [(f"algorithm.gate.{key}", value) for key, value in gate.items()]


@dataclass
class Workload:
    """Everything that both ways of running an epoch share.

    Attributes:
        model: a `gardo.models.pipeline.PipelineModel` that implements `FlowModel`.
        prompts: the epoch's ``P`` prompts.
        encodes: whether the model has text encoders; else prompt embeddings are random.
        encode_seconds: what encoding all prompts once took, random numbers included.
        start: the policy's weights, restored before every epoch.
    """

    config: Config
    runtime: Runtime
    model: Any
    adapters: LoraAdapters
    embeddings: EmbeddingTable
    prompts: list[Prompt]
    rewards: RewardSet
    plan: EpochPlan
    schedule: Schedule
    table: StepTable
    resolution: int
    encodes: bool
    encode_seconds: float
    start: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.runtime.device

    @property
    def texts(self) -> list[str]:
        """The prompts' texts."""
        return [prompt.text for prompt in self.prompts]

    @property
    def dtype(self) -> torch.dtype:
        """The working precision."""
        return DTYPES[self.config.precision]

    def sampler(self, **options: Any) -> Sampler:
        """A sampler with the configuration's guidance and batch size; ``options`` are its own."""
        sampling = self.config.sampling
        return Sampler(
            self.model,
            self.embeddings,
            self.resolution,
            sampling.guidance_scale,
            sampling.batch_size,
            offload=sampling.offload_trajectories,
            **options,
        )

    def restore(self) -> None:
        """Bring the policy back to where every epoch starts."""
        self.adapters.load_state_dict(POLICY, self.start)

    def optimizer(self, fused: bool) -> Any:
        """The recipe's AdamW on the policy."""
        train = self.config.train
        return torch.optim.AdamW(
            self.adapters.parameters(POLICY).values(),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            fused=fused or None,
        )


def build_workload(
    config: Config, runtime: Runtime, arch: Architecture | None, source: str = "tiny"
) -> Workload:
    """Build model, prompts and schedule. The transformer's weights are float32 at first.

    Their values are those of the working precision, so that storing them in it changes nothing.

    Args:
        arch: build it with random weights; None: load ``model.path``.
        source: ``tiny`` takes its prompts from the recipe; others get made-up texts.

    Raises:
        UserError: the model cannot be loaded, or there are several processes.
    """
    if runtime.world_size > 1:
        raise UserError(f"the benchmark runs in one process, got {runtime.world_size}")
    torch.manual_seed(config.seed)
    # attention kernels and compilation are this library's options, set when its turn comes
    plain = config.model.model_copy(update={"attention_backend": None, "compile": False})
    dtype = DTYPES[config.precision]
    if arch is None:
        model: Any = load_model(plain, runtime.device, config.precision)
    else:
        model = random_model(arch, config, runtime.device)
        configure(model, plain)
    model.dtype = dtype
    store_weights(model.transformer, dtype)
    store_weights(model.transformer, torch.float32)

    prompts = epoch_prompts(config, source)
    encodes = getattr(model.pipeline, FAMILIES[model.family].text_encoders[0]) is not None
    started = time.perf_counter()
    encoder = model
    if not encodes:
        if arch is None:
            raise UserError(f"model.path '{config.model.path}': it has no text encoders")
        length = config.model.max_sequence_length
        encoder = stand_ins.TextEncoder(arch, length, dtype, runtime.device)
    embeddings = EmbeddingTable(encoder, [p.text for p in prompts])
    embeddings.stage([p.text for p in prompts])
    encode_seconds = time.perf_counter() - started
    model.place()

    adapters = LoraAdapters(model, config.model, config.seed, ("policy", "reference"))
    disturb(adapters, config.seed)
    resolution = config.sampling.resolution or model.default_resolution
    sampling = config.sampling
    schedule = model.schedule(sampling.num_steps, resolution)
    table = step_table(
        schedule,
        runtime.device,
        kind=sampling.sde,
        noise_level=sampling.noise_level,
        kl_scale=config.algorithm.kl_scale,
        window=sde_window(sampling, config.seed, EPOCH),
    )
    return Workload(
        config=config,
        runtime=runtime,
        model=model,
        adapters=adapters,
        embeddings=embeddings,
        prompts=prompts,
        rewards=RewardSet(config.rewards, runtime.device),
        plan=plan_epoch(
            config.prompts.per_epoch, config.prompts.group_size, config.train.updates_per_epoch
        ),
        schedule=schedule,
        table=table,
        resolution=resolution,
        encodes=encodes,
        encode_seconds=encode_seconds,
        start=adapters.state_dict(POLICY),
    )


def random_model(arch: Architecture, config: Config, device: torch.device) -> PipelineModel:
    """The pipeline of an architecture with random weights, without its text encoders.

    ``tiny`` has them, because its own are built in a moment.
    """
    if arch.name == "tiny":
        from tools.tiny.models import build_sd3_pipeline

        pipeline: Any = build_sd3_pipeline(config.seed)
        dtype = DTYPES[config.precision]
        for name in arch.text_encoders:
            getattr(pipeline, name).to(dtype)
    else:
        pipeline = _without_encoders(arch, device)
    pipeline.vae.to(DTYPES[config.model.vae_dtype or "fp32"])
    wrap = model_class(FAMILIES[arch.family])
    return wrap(pipeline, device, config.model.max_sequence_length)


def _without_encoders(arch: Architecture, device: torch.device) -> Any:
    import diffusers

    with device:  # where billions of random numbers are drawn in a moment
        transformer, vae = build_transformer(arch), build_vae(arch)
    kind: Any = getattr(diffusers, FAMILIES[arch.family].pipeline)
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in arch.text_encoders]
    return kind(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**arch.scheduler),
        **dict.fromkeys([*arch.text_encoders, *tokenizers]),
    )


def store_weights(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights in this precision; LoRA's stay in float32."""
    for name, tensor in chain(transformer.named_parameters(), transformer.named_buffers()):
        if ".lora_" not in name and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def disturb(adapters: LoraAdapters, seed: int) -> None:
    """Move the policy away from its reference, as training does; LoRA starts with equal ones."""
    source = torch.Generator().manual_seed(derive_seed(seed, "disturb"))
    for name, parameter in adapters.parameters(POLICY).items():
        if ".lora_B." in name:
            parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=source))


def epoch_prompts(config: Config, source: str) -> list[Prompt]:
    """The prompts of an epoch: of the recipe for ``tiny``, else made-up ones."""
    count = config.prompts.per_epoch
    if source == "tiny":
        return PromptSampler(load_prompts(config.prompts), count, config.seed).epoch(EPOCH)
    return [Prompt(f"a photo of {i + 2} red apples on a wooden table") for i in range(count)]
