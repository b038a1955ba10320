"""The keys of a configuration: one typed section per area, and what must hold between them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gardo.config.fields import (
    ClipRange,
    Fraction,
    Names,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Proxy,
    Section,
    Servers,
    Share,
    Trackers,
    as_names,
    as_pair,
    key,
    section,
)
from gardo.config.traits import TRAITS


class LoraConfig(Section):
    rank: Positive = key(16, "rank of the LoRA matrices")
    alpha: PositiveFloat = key(32.0, "LoRA scale numerator; the scale is alpha / rank")
    targets: Annotated[Names, Field(min_length=1)] | None = key(
        None, "modules that get LoRA; null: the family's own list"
    )


class ModelConfig(Section):
    path: str = key("builtin:tiny", "hub id, folder, or builtin:tiny")
    revision: str | None = key(None, "hub revision")
    variant: str | None = key(None, "weight variant, such as fp16")
    family: Literal["auto", "sd3", "flux"] = key("auto", "auto reads model_index.json")
    max_sequence_length: Positive = key(128, "T5 tokens per prompt")
    embedding_cache: str | None = key(None, "folder that keeps prompt embeddings between runs")
    full_finetune: bool = key(False, "train all transformer weights instead of LoRA")
    gradient_checkpointing: bool = key(False, "recompute activations to save memory")
    attention_backend: str | None = key(
        None, "diffusers' attention backend, such as flash or native; null: diffusers' default"
    )
    compile: bool = key(False, "torch.compile each transformer block")
    vae_dtype: Literal["fp32", "fp16", "bf16"] | None = key(
        None, "precision of the image decoder; null: fp32"
    )
    vae_tiling: bool = key(False, "decode large images in tiles")
    vae_slicing: bool = key(False, "decode images one at a time")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")


class PromptsConfig(Section):
    path: str | None = key(
        None, "prompts: a .txt (a prompt a line) or .jsonl file, or a folder of them by split"
    )
    dataset: str | None = key(None, "prompts: Hugging Face data set, used where there is no path")
    column: str = key("prompt", "column of the data set that has the prompts")
    split: str = key("train", "which part of a folder, a data set or a generator: train, test")
    generator: Literal["shapes", "geneval", "ocr", "counting"] | None = key(
        None, "built-in prompts, used where there is neither path nor data set"
    )
    parameters: dict[str, Any] = key({}, "keyword arguments of the generator")
    per_epoch: Positive = key(8, "P, distinct prompts per epoch")
    group_size: Annotated[int, Field(ge=2)] = key(16, "G, samples per prompt")


class SamplingConfig(Section):
    num_steps: Annotated[int, Field(ge=2)] = key(10, "denoising steps of a rollout")
    guidance_scale: NonNegativeFloat = key(1.0, "guidance; for sd3, 1 or less switches it off")
    noise_level: Annotated[float, Field(gt=0.0, le=2.0)] = key(0.7, "eta of the SDE")
    sde: Literal["flow", "cps", "dance"] = key("flow", "SDE variant")
    solver: Literal["euler", "dpm2"] = key(
        "euler", "ODE solver of rollouts without noise (nft): Euler or second-order DPM-Solver++"
    )
    sde_window: NonNegative = key(0, "noise and training on at most this many steps; 0: all")
    sde_window_range: Annotated[tuple[int, int] | None, BeforeValidator(as_pair)] = key(
        None, "first and last+1 step that the window may cover; null: the first half"
    )
    resolution: Positive | None = key(None, "image side in pixels; null: the model's own")
    batch_size: Positive = key(64, "samples per forward in rollout and reference pass")
    same_latent: bool = key(False, "start all samples of a prompt from the same latent")
    cuda_graph: Literal["auto", "on", "off"] = key("auto", "capture the sampler; auto: if possible")
    offload_trajectories: bool = key(False, "keep latents of the epoch in CPU memory")
    max_ratio_deviation: PositiveFloat | None = key(
        1e-3, "stop before the first update if |ratio - 1| exceeds this; null: report only"
    )


class RewardClientConfig(Section):
    timeout: PositiveFloat = key(60.0, "seconds to wait for the answer to a request")
    connect_timeout: PositiveFloat = key(5.0, "seconds to wait for a connection")
    retries: NonNegative = key(6, "further rounds over all servers before the run stops")
    backoff: PositiveFloat = key(1.0, "seconds before the first retry; doubles, at most 30")
    startup_timeout: PositiveFloat = key(300.0, "seconds to wait for a server that is loading")
    encoding: Literal["safetensors", "png"] = key(
        "safetensors", "images as they are, or as PNG: smaller, rounded to 8 bits"
    )
    token_env: str = key("GARDO_REWARD_TOKEN", "environment variable with the bearer token")
    token_file: str | None = key(None, "file with the bearer token; wins over the variable")


class RewardsConfig(Section):
    proxy: Proxy = key(
        "count",
        "the reward that is trained on: a name or module:attribute; several as {name: weight}",
    )
    aux: Names = key([], "auxiliary rewards that the gate consults")
    eval: Names = key([], "held-out rewards, never trained on")
    parameters: dict[str, dict[str, Any]] = key(
        {}, "keyword arguments per name of a reward or feature extractor"
    )
    features: str | None = key(None, "feature extractor for diversity")
    max_missing_share: Fraction = key(
        0.1, "the run stops when a reward could not score more than this share of the samples"
    )
    servers: dict[str, Servers] = key(
        {}, "reward name -> URLs of the servers that score it (python -m gardo.rewards.serve)"
    )
    client: RewardClientConfig = section(RewardClientConfig, "how servers are asked")

    @property
    def proxy_weights(self) -> dict[str, float]:
        """The rewards whose weighted sum is trained on."""
        return {self.proxy: 1.0} if isinstance(self.proxy, str) else self.proxy

    @property
    def proxy_name(self) -> str:
        """What metrics call the proxy: the reward's name, or ``proxy`` for a weighted sum."""
        return self.proxy if isinstance(self.proxy, str) else "proxy"


class GateConfig(Section):
    mode: Literal["paper", "official", "all", "off"] = key(
        "paper",
        "which samples get the KL penalty: over-rated by the proxy (paper), under-rated (official)",
    )
    ties: Literal["auto", "half", "ordinal"] = key(
        "auto",
        "equal rewards count one half, or rank in sample order; auto: half, with mode official "
        "ordinal",
    )
    fraction: Fraction = key(0.1, "initial share of samples that are gated")
    share_of: Literal["nonnegative", "all"] = key(
        "nonnegative", "what the fraction is a share of: the samples with U >= 0, or all"
    )
    adaptive: bool = key(True, "adapt the fraction to the trend of the uncertainty")
    scope: Literal["batch", "group"] = key("batch", "win rates over the batch or the prompt group")


class ReferenceConfig(Section):
    kl_threshold: NonNegativeFloat = key(3e-4, "reset when the epoch's KL exceeds this; 0: never")
    reset_every: NonNegative = key(10, "reset at least every so many epochs; 0: never")
    judged_by: Literal["epoch", "update"] = key(
        "epoch",
        "which KL the threshold looks at: the epoch's mean over gated samples, or the KL term in "
        "the loss of any optimizer step",
    )
    guard: bool = key(
        False, "reset only to a policy that the auxiliary rewards trust no less than the reference"
    )
    guard_window: Positive = key(5, "epochs that the guard judges a policy by")
    guard_share: Share = key(
        0.05, "share of the samples, the most uncertain, whose mean uncertainty it watches"
    )
    guard_uncertainty: NonNegativeFloat = key(
        0.05, "most that this mean may exceed the lowest of any reference so far"
    )
    guard_win_rate: Fraction = key(
        0.5, "least win rate against the reference's samples by the auxiliary rewards"
    )


class NFTConfig(Section):
    beta: PositiveFloat = key(1.0, "strength of the implicit positive and negative policies")
    decay_rate: NonNegativeFloat = key(
        0.001, "the behaviour policy keeps min(rate * (optimizer steps - start), max) of itself"
    )
    decay_start: NonNegative = key(0, "optimizer steps in which it follows the policy at once")
    decay_max: Fraction = key(0.5, "the most that it keeps of itself at an epoch's end")


# what the published code does differently; each key can also be set alone
_OFFICIAL = {"kl_scale": "official", "kl_reduction": "microbatch"}
_OFFICIAL_SECTIONS: dict[str, dict[str, Any]] = {
    "gate": {"mode": "official", "ties": "ordinal", "share_of": "nonnegative"},
    "reference": {"judged_by": "update", "reset_every": 16},  # more than 15 epochs
}


class AlgorithmConfig(Section):
    name: Literal["grpo", "nft"] = key(
        "grpo", "policy gradient on the denoising steps, or DiffusionNFT on the forward process"
    )
    compat: Literal["paper", "official"] = key(
        "paper",
        "official: defaults of gate.mode, gate.ties, gate.share_of, kl_scale, kl_reduction, "
        "kl_when_ungated and reference.judged_by, .reset_every as in the published code",
    )
    kl_coef: NonNegativeFloat = key(0.1, "weight of the KL penalty; 0: no reference pass")
    kl_scale: Literal["exact", "official"] = key("exact", "variance in the KL")
    kl_reduction: Literal["gated", "batch", "microbatch"] = key(
        "gated",
        "KL averaged over the gated samples of an update, over all its samples, or over the gated "
        "samples of each micro-batch",
    )
    kl_when_ungated: Literal["none", "all"] = key(
        "none", "who is penalised where no sample of an update or micro-batch is gated"
    )
    clip_range: ClipRange = key(1e-4, "PPO clip range, or [low, high]")
    ratio_norm: Literal["none", "guard"] = key(
        "none", "guard: GRPO-Guard's normalised ratio and gradient weights (grpo)"
    )
    adv_clip: PositiveFloat = key(5.0, "advantages are clamped to +- this")
    advantage_norm: Literal["none", "group_std", "global_std"] = key(
        "none", "what centred rewards are divided by"
    )
    diversity: bool = key(True, "multiply positive advantages by the nearest-neighbour distance")
    gate: GateConfig = section(GateConfig, "which samples are penalised")
    reference: ReferenceConfig = section(ReferenceConfig, "when the reference policy is reset")
    nft: NFTConfig = section(NFTConfig, "DiffusionNFT's own settings")

    @model_validator(mode="before")
    @classmethod
    def _official_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("compat") != "official":
            return data
        data = {**_OFFICIAL, **data}
        if data.get("name") == "nft":
            data.setdefault("kl_when_ungated", "all")
        for name, defaults in _OFFICIAL_SECTIONS.items():
            own = data.get(name) or {}
            data[name] = {**defaults, **own} if isinstance(own, Mapping) else own
        return data


class TrainConfig(Section):
    batch_size: Positive = key(64, "samples per forward and backward")
    updates_per_epoch: Positive = key(2, "optimizer steps per epoch")
    learning_rate: PositiveFloat = key(3e-4, "AdamW learning rate")
    adam_beta1: Fraction = key(0.9, "AdamW beta1")
    adam_beta2: Fraction = key(0.999, "AdamW beta2")
    adam_eps: PositiveFloat = key(1e-8, "AdamW epsilon")
    weight_decay: NonNegativeFloat = key(1e-4, "AdamW weight decay")
    fused_optimizer: bool = key(False, "AdamW as one fused kernel")
    max_grad_norm: PositiveFloat = key(1.0, "gradient clipping")
    timestep_fraction: Share = key(0.4, "share of the steps that are trained")
    timestep_selection: Literal["random", "first"] = key(
        "random", "which steps: random ones per epoch, or the first ones"
    )
    ema: bool = key(False, "keep an exponential moving average of the policy and export it")
    ema_decay: Fraction = key(0.9, "decay of the average")
    ema_every: Positive = key(8, "optimizer steps between two averages")


class EvaluationConfig(Section):
    every: NonNegative = key(0, "epochs between held-out evaluations; 0: at start and end only")
    at_start: bool = key(True, "evaluate before the first epoch, too")
    samples_per_prompt: Annotated[int, Field(ge=2)] = key(4, "images per prompt")
    max_prompts: Positive = key(40, "prompts judged, the first ones")
    num_steps: Annotated[int, Field(ge=2)] = key(20, "denoising steps, without noise")
    guidance_scale: NonNegativeFloat | None = key(None, "null: as in sampling")
    grid_images: NonNegative = key(24, "images in a grid; 0: no grids")
    reference_images: Literal["shapes"] | None = key(
        None, "real images for the feature distance; shapes: rendered ones"
    )
    seed: NonNegative = key(1234, "seed of the images, the same at every evaluation")


class CheckpointConfig(Section):
    every: NonNegative = key(
        10, "epochs between checkpoints; 0: only when the run stops, fails or ends"
    )
    keep_last: Positive = key(2, "how many of the newest are kept")
    keep_best: str | None = key(
        None,
        "keep the best one, too, by this metric of metrics.jsonl, or evaluation/NAME for one of "
        "evaluation.jsonl",
    )
    best: Literal["max", "min"] = key("max", "whether keep_best looks for the largest or smallest")
    snapshot: bool = key(
        True,
        "keep a copy of the trained weights and the optimizer in host memory, so that a signal "
        "can end the run within an epoch's updates; false: it lets them finish",
    )


Alarm = Literal[
    "ratio",
    "ratio_mean",
    "clip_fraction",
    "kl",
    "grad_norm",
    "reward_drop",
    "reward_rise",
    "missing",
    "diversity",
    "image_variance",
]


class HealthConfig(Section):
    max_skipped_in_a_row: Positive = key(
        3, "the run stops after so many updates in a row that were not finite and left out"
    )
    stop_on: Annotated[list[Alarm], BeforeValidator(as_names)] = key(
        [], "alarms, named as the keys below, that stop the run; all others only warn"
    )
    patience: Positive = key(3, "epochs in a row that a threshold is reached before its alarm")
    ratio: PositiveFloat | None = key(
        0.01, "alarm: max |ratio - 1| of an epoch's first update, where only rounding is; null: off"
    )
    ratio_mean: PositiveFloat | None = key(0.1, "alarm: mean |ratio - 1| of an epoch")
    clip_fraction: Share | None = key(
        0.9, "alarm: share of ratios outside clip_range in the updates after an epoch's first"
    )
    kl: PositiveFloat | None = key(0.1, "alarm: mean KL of the gated samples")
    grad_norm: PositiveFloat | None = key(100.0, "alarm: mean gradient norm before clipping")
    reward_drop: PositiveFloat | None = key(
        1.0,
        "alarm: fall of the proxy's mean below that of the first epoch, in standard deviations of "
        "that epoch's samples",
    )
    reward_rise: PositiveFloat | None = key(5.0, "alarm: its rise, likewise")
    missing: Share | None = key(0.05, "alarm: share of samples that a reward could not score")
    diversity: Share | None = key(
        0.5, "collapse alarm: nearest-neighbour distance as a share of the first epoch's"
    )
    image_variance: Share | None = key(
        0.5, "collapse alarm: variance of the images of a prompt as a share of the first epoch's"
    )


class Config(Section):
    """The whole run. Attributes are the areas of the command line."""

    recipe: str = key("", "name of the recipe, for reports; filled in from the command line")
    seed: NonNegative = key(42, "seed of everything random")
    output_dir: str = key("runs/{recipe}", "run folder; {recipe} is replaced")
    overwrite: bool = key(False, "replace the contents of an existing run folder")
    epochs: NonNegative = key(40, "epochs: one rollout and its updates each")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to run")
    precision: Literal["fp32", "fp16", "bf16"] = key("fp32", "of the frozen weights and matmuls")
    threads: Annotated[int, Field(ge=0, le=1024)] = key(0, "CPU threads; 0: torch's default")
    trackers: Trackers = key(
        [], "tensorboard, wandb: where metrics go beside metrics.jsonl (offline, see WANDB_MODE)"
    )
    model: ModelConfig = section(ModelConfig, "what is fine-tuned")
    prompts: PromptsConfig = section(PromptsConfig, "what is drawn")
    sampling: SamplingConfig = section(SamplingConfig, "how rollouts are made")
    rewards: RewardsConfig = section(RewardsConfig, "what scores the images")
    algorithm: AlgorithmConfig = section(AlgorithmConfig, "GARDO's parts and their switches")
    train: TrainConfig = section(TrainConfig, "optimisation")
    evaluation: EvaluationConfig = section(EvaluationConfig, "held-out evaluation and pictures")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "what a run is resumed from")
    health: HealthConfig = section(HealthConfig, "when a run warns that it goes wrong, or stops")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self


def _contradictions(c: Config) -> Iterator[str]:
    if c.prompts.path is None and c.prompts.dataset is None and c.prompts.generator is None:
        yield "prompts: expected prompts.path, prompts.dataset or prompts.generator, got none"
    samples = c.prompts.per_epoch * c.prompts.group_size
    if c.train.updates_per_epoch > samples:
        yield (
            f"train.updates_per_epoch: expected at most per_epoch x group_size = {samples}, "
            f"got {c.train.updates_per_epoch}"
        )
    window = c.sampling.sde_window
    if c.sampling.sde_window_range is not None:
        low, high = c.sampling.sde_window_range
        # it may reach beyond num_steps, where it ends: a recipe's range outlives fewer steps
        if not 0 <= low < high or high - low < window:
            yield (
                "sampling.sde_window_range: expected 0 <= first < last that holds the window of "
                f"{window} steps, got [{low}, {high}]"
            )
    gate = c.algorithm.gate
    if c.algorithm.kl_coef > 0 and gate.mode in ("paper", "official") and not c.rewards.aux:
        yield (
            f"algorithm.gate.mode: '{gate.mode}' needs at least one auxiliary reward "
            "(rewards.aux); without one use gate.mode all or off"
        )
    if c.algorithm.reference.guard and not c.rewards.aux:
        yield "algorithm.reference.guard: needs at least one auxiliary reward (rewards.aux)"
    if gate.adaptive and gate.mode in ("paper", "official") and not 0.02 <= gate.fraction <= 0.2:
        yield (
            "algorithm.gate.fraction: an adaptive fraction moves in [0.02, 0.2]; expected a start "
            f"within it (or algorithm.gate.adaptive false), got {gate.fraction}"
        )
    if c.algorithm.diversity and c.rewards.features is None:
        yield "algorithm.diversity: needs rewards.features (what distances are measured in)"
    for role in ("proxy_weights", "aux", "eval"):
        names = list(getattr(c.rewards, role))
        for name in names:
            # it becomes part of metric names and of servers' URLs
            if not re.fullmatch(r"(?!\.+$)[\w.:+-]+", name):
                yield (
                    f"rewards.{role.split('_')[0]}: expected names of letters, digits and _ . : + "
                    f"-, got '{name}'"
                )
            if names.count(name) > 1:
                yield f"rewards.{role}: expected different rewards, got '{name}' twice"
    for name in c.rewards.proxy_weights:
        if name in c.rewards.aux:
            yield f"rewards.aux: '{name}' is the proxy and cannot judge itself"
    name, traits = c.algorithm.name, TRAITS[c.algorithm.name]
    if c.algorithm.ratio_norm != "none" and not traits.ratios:
        yield (
            f"algorithm.ratio_norm: {name} has no ratio; expected none, "
            f"got {c.algorithm.ratio_norm}"
        )
    if c.sampling.same_latent and not traits.noisy:
        yield (
            f"sampling.same_latent: {name} adds no noise while sampling, so all samples of a "
            "prompt would be the same image; expected false"
        )
    if c.sampling.solver != "euler" and traits.noisy:
        yield (
            f"sampling.solver: {name}'s rollouts are noisy steps; expected euler, "
            f"got {c.sampling.solver}"
        )
    if c.model.full_finetune and c.precision == "fp16":
        yield "model.full_finetune: expected precision fp32 or bf16, got fp16"
    for alarm in c.health.stop_on:
        if getattr(c.health, alarm) is None:
            yield f"health.stop_on: '{alarm}' is off; expected a threshold for health.{alarm}"
        if alarm == "diversity" and c.rewards.features is None:
            yield "health.stop_on: 'diversity' needs rewards.features, which distances are of"
        if alarm in ("ratio", "ratio_mean", "clip_fraction") and not traits.ratios:
            yield f"health.stop_on: {name} has no ratio; expected alarms of {name}, got '{alarm}'"
        if alarm == "kl" and c.algorithm.kl_coef == 0:
            yield "health.stop_on: 'kl' is not measured without algorithm.kl_coef"
    best, every = c.checkpoint.keep_best, c.checkpoint.every
    if best is not None and best.startswith("evaluation/"):
        if not (every and c.evaluation.every and c.evaluation.every % every == 0):
            yield (
                f"checkpoint.keep_best: '{best}' needs checkpoints where evaluations are; expected "
                f"evaluation.every to be a multiple of checkpoint.every, got "
                f"{c.evaluation.every} and {every}"
            )
