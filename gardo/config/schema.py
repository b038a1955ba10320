"""The keys of a configuration: one typed section per area."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gardo.config.algorithm import AlgorithmConfig
from gardo.config.compat import with_compat_defaults
from gardo.config.fields import (
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
    free_key,
    key,
    rounding_key,
    section,
)
from gardo.config.generators import GENERATORS
from gardo.families import FAMILIES


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
    family: Literal[("auto", *FAMILIES)] = key(  # type: ignore[valid-type]
        "auto", "auto reads model_index.json"
    )
    max_sequence_length: Positive = key(128, "T5 tokens per prompt")
    embedding_cache: str | None = free_key(None, "folder that keeps prompt embeddings between runs")
    full_finetune: bool = key(False, "train all transformer weights instead of LoRA")
    gradient_checkpointing: bool = rounding_key(False, "recompute activations to save memory")
    attention_backend: str | None = rounding_key(
        None, "diffusers' attention backend, such as flash or native; null: diffusers' default"
    )
    compile: bool = rounding_key(False, "torch.compile each transformer block")
    vae_dtype: Literal["fp32", "fp16", "bf16"] | None = rounding_key(
        None, "precision of the image decoder; null: fp32"
    )
    vae_tiling: bool = rounding_key(False, "decode large images in tiles")
    vae_slicing: bool = rounding_key(False, "decode images one at a time")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")


class PromptsConfig(Section):
    path: str | None = key(
        None, "prompts: a .txt (a prompt a line) or .jsonl file, or a folder of them by split"
    )
    dataset: str | None = key(None, "prompts: Hugging Face data set, used where there is no path")
    column: str = key("prompt", "column of the data set that has the prompts")
    split: str = key("train", "which part of a folder, a data set or a generator: train, test")
    generator: Literal[tuple(GENERATORS)] | None = key(  # type: ignore[valid-type]
        None, "built-in prompts, used where there is neither path nor data set"
    )
    parameters: dict[str, Any] = key({}, "keyword arguments of the generator")
    per_epoch: Positive = key(8, "P, distinct prompts per epoch")
    group_size: Annotated[int, Field(ge=2)] = key(16, "G, samples per prompt")


class SamplingConfig(Section):
    num_steps: Annotated[int, Field(ge=2)] = key(10, "denoising steps of a rollout")
    guidance_scale: NonNegativeFloat = key(1.0, "guidance; classifier-free: off at 1 or less")
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
    batch_size: Positive = rounding_key(64, "samples per forward in rollout and reference pass")
    same_latent: bool = key(False, "start all samples of a prompt from the same latent")
    cuda_graph: Literal["auto", "on", "off"] = rounding_key(
        "auto", "capture the sampler; auto: if possible"
    )
    offload_trajectories: bool = rounding_key(False, "keep latents of the epoch in CPU memory")


class RewardClientConfig(Section):
    timeout: PositiveFloat = free_key(60.0, "seconds to wait for the answer to a request")
    connect_timeout: PositiveFloat = free_key(5.0, "seconds to wait for a connection")
    retries: NonNegative = free_key(6, "further rounds over all servers before the run stops")
    backoff: PositiveFloat = free_key(1.0, "seconds before the first retry; doubles, at most 30")
    startup_timeout: PositiveFloat = free_key(300.0, "seconds to wait for a server that is loading")
    encoding: Literal["safetensors", "png"] = rounding_key(
        "safetensors", "images as they are, or as PNG: smaller, rounded to 8 bits"
    )
    token_env: str = free_key("GARDO_REWARD_TOKEN", "environment variable with the bearer token")
    token_file: str | None = free_key(None, "file with the bearer token; wins over the variable")


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
    max_missing_share: Fraction = free_key(
        0.1, "the run stops when a reward could not score more than this share of the samples"
    )
    servers: dict[str, Servers] = free_key(
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


class TrainConfig(Section):
    batch_size: Positive = rounding_key(64, "samples per forward and backward")
    updates_per_epoch: Positive = key(2, "optimizer steps per epoch")
    learning_rate: PositiveFloat = key(3e-4, "AdamW learning rate")
    adam_beta1: Fraction = key(0.9, "AdamW beta1")
    adam_beta2: Fraction = key(0.999, "AdamW beta2")
    adam_eps: PositiveFloat = key(1e-8, "AdamW epsilon")
    weight_decay: NonNegativeFloat = key(1e-4, "AdamW weight decay")
    fused_optimizer: bool = rounding_key(False, "AdamW as one fused kernel")
    max_grad_norm: PositiveFloat = key(1.0, "gradient clipping")
    timestep_fraction: Share = key(0.4, "share of the steps that are trained")
    timestep_selection: Literal["random", "first"] = key(
        "random", "which steps: random ones per epoch, or the first ones"
    )
    ema: bool = key(False, "keep an exponential moving average of the policy and export it")
    ema_decay: Fraction = key(0.9, "decay of the average")
    ema_every: Positive = key(8, "optimizer steps between two averages")


class EvaluationConfig(Section):
    every: NonNegative = free_key(
        0, "epochs between held-out evaluations; 0: at start and end only"
    )
    at_start: bool = free_key(True, "evaluate before the first epoch, too")
    samples_per_prompt: Annotated[int, Field(ge=2)] = key(4, "images per prompt")
    max_prompts: Positive = key(40, "prompts judged, the first ones")
    num_steps: Annotated[int, Field(ge=2)] = key(20, "denoising steps, without noise")
    guidance_scale: NonNegativeFloat | None = key(None, "null: as in sampling")
    grid_images: NonNegative = free_key(24, "images in a grid; 0: no grids")
    reference_images: Literal["shapes"] | None = key(
        None, "real images for the feature distance; shapes: rendered ones"
    )
    seed: NonNegative = key(1234, "seed of the images, the same at every evaluation")


class CheckpointConfig(Section):
    every: NonNegative = free_key(
        10, "epochs between checkpoints; 0: only when the run stops, fails or ends"
    )
    keep_last: Positive = free_key(2, "how many of the newest are kept")
    keep_best: str | None = free_key(
        None,
        "keep the best one, too, by this metric of metrics.jsonl, or evaluation/NAME for one of "
        "evaluation.jsonl",
    )
    best: Literal["max", "min"] = free_key(
        "max", "whether keep_best looks for the largest or smallest"
    )
    snapshot: bool = free_key(
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
    max_skipped_in_a_row: Positive = free_key(
        3, "the run stops after so many updates in a row that were not finite and left out"
    )
    stop_on: Annotated[list[Alarm], BeforeValidator(as_names)] = free_key(
        [], "alarms, named as the keys below, that stop the run; all others only warn"
    )
    patience: Positive = free_key(3, "epochs in a row that a threshold is reached before its alarm")
    ratio: PositiveFloat | None = free_key(
        1e-3,
        "most that |ratio - 1| may be where only rounding is: above it before the first update the "
        "run stops; alarm: reached by the first update of an epoch; null: report only",
    )
    ratio_mean: PositiveFloat | None = free_key(0.1, "alarm: mean |ratio - 1| of an epoch")
    clip_fraction: Share | None = free_key(
        0.9, "alarm: share of ratios outside clip_range in the updates after an epoch's first"
    )
    kl: PositiveFloat | None = free_key(0.1, "alarm: mean KL of the gated samples")
    grad_norm: PositiveFloat | None = free_key(100.0, "alarm: mean gradient norm before clipping")
    reward_drop: PositiveFloat | None = free_key(
        1.0,
        "alarm: fall of the proxy's mean below that of the first epoch, in standard deviations of "
        "that epoch's samples",
    )
    reward_rise: PositiveFloat | None = free_key(5.0, "alarm: its rise, likewise")
    missing: Share | None = free_key(0.05, "alarm: share of samples that a reward could not score")
    diversity: Share | None = free_key(
        0.5, "collapse alarm: nearest-neighbour distance as a share of the first epoch's"
    )
    image_variance: Share | None = free_key(
        0.5, "collapse alarm: variance of the images of a prompt as a share of the first epoch's"
    )


class Config(Section):
    """The whole run. Attributes are the areas of the command line."""

    recipe: str = free_key("", "name of the recipe, for reports; filled in from the command line")
    seed: NonNegative = key(42, "seed of everything random")
    output_dir: str = free_key("runs/{recipe}", "run folder; {recipe} is replaced")
    overwrite: bool = free_key(False, "replace the contents of an existing run folder")
    epochs: NonNegative = free_key(40, "epochs: one rollout and its updates each")
    device: Literal["auto", "cpu", "cuda"] = rounding_key("auto", "where to run")
    precision: Literal["fp32", "fp16", "bf16"] = key("fp32", "of the frozen weights and matmuls")
    threads: Annotated[int, Field(ge=0, le=1024)] = rounding_key(
        0, "CPU threads; 0: torch's default"
    )
    trackers: Trackers = free_key(
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

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_compat(cls, data: Any) -> Any:
        """Those outside ``algorithm``."""
        if not isinstance(data, Mapping):
            return data
        algorithm, sampling = data.get("algorithm", {}), data.get("sampling", {})
        if not isinstance(algorithm, Mapping) or not isinstance(sampling, Mapping):
            return data
        compat, name = algorithm.get("compat", "gardo"), algorithm.get("name", "grpo")
        return {**data, "sampling": with_compat_defaults(sampling, "sampling", compat, name)}
