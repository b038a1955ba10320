"""Pretraining of the embedded model: the autoencoder, then the rectified-flow transformer."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from gardo.tiny.scenes import Scene, all_scenes, render
from tools.tiny.models import zero_initialize
from tools.tiny.muon import Muon

# Words around a prompt, known and unknown ones: the model learns to look past them.
TEMPLATES = ("some {}", "{} on grey", "an image of {}", "a photo of {}", "draw {}", "{} yes")
TEMPLATE_SHARE = 0.1
UNCONDITIONAL_SHARE = 0.1  # prompts replaced by the empty one, for classifier-free guidance
# T5 lengths of a batch and their shares. T5's output at padding is zero, so a length is only a
# number of equal tokens; the long ones teach the model that this number means nothing.
T5_LENGTHS = {8: 0.55, 16: 0.39, 64: 0.04, 256: 0.02}
T5_ENCODED = 8  # enough for every template; longer sequences only add padding
SHIFT = 3.0  # of the scheduler, applied to the training timesteps as in SD3
UNIFORM_SHARE = 0.2  # timesteps drawn uniformly, else logit-normally


@dataclass
class FlowSettings:
    """Settings of :func:`train_transformer`."""

    steps: int = 1000
    batch_size: int = 48
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    ema_decay: float = 0.99


def train_autoencoder(
    vae: AutoencoderKL,
    generator: torch.Generator,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    kl_weight: float = 1e-4,
) -> float:
    """Train the autoencoder on rendered scenes and set its scaling and shift factors.

    Reconstruction (mean square plus mean absolute error) with a small KL term. Afterwards the
    latents ``(z - shift_factor) * scaling_factor`` of rendered scenes have mean 0 and variance 1.

    Returns:
        Mean absolute reconstruction error of the last tenth of the training, in [-1, 1] units.
    """
    vae.train()
    scenes = all_scenes()
    optimizer = AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    errors: list[float] = []
    progress = tqdm(range(steps), desc="autoencoder", unit="step")
    for step in progress:
        _set_learning_rate(optimizer, learning_rate, step / steps)
        images = 2 * render(_draw(scenes, batch_size, generator), generator) - 1
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded - images).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(decoded, images) + error + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item())
        if step % 20 == 0:
            progress.set_postfix(error=f"{errors[-1]:.4f}")
    vae.eval()
    with torch.no_grad():
        images = 2 * render(scenes * 10, generator) - 1
        latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 5),
        scaling_factor=round(1.0 / latents.std().item(), 5),
    )
    tail = errors[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Render and encode scenes, as often as not of each kind.

    Returns:
        latents ``[count, C, h, w]`` float32, scaled as the pipeline scales them, and the index of
        each one's scene in ``all_scenes()``, ``[count]`` int64.
    """
    scenes = all_scenes()
    index = torch.randint(len(scenes), (count,), generator=generator)
    chunks = []
    for rows in tqdm(index.split(512), desc="latents", unit="batch"):
        images = 2 * render([scenes[i] for i in rows.tolist()], generator) - 1
        latents = vae.encode(images).latent_dist.mean
        chunks.append((latents - vae.config.shift_factor) * vae.config.scaling_factor)
    return torch.cat(chunks), index


@dataclass
class PromptTable:
    """Encoded prompts: row ``template * scenes + scene``, template 0 being the plain prompt.

    The last row is the empty prompt.
    """

    context: Tensor  # [R, CLIP tokens + T5 tokens, D]
    pooled: Tensor  # [R, P]
    scenes: int

    def draw(self, scene: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Conditioning of a batch of scene indices ``[B]``, with templates, dropout and a length.

        Returns:
            context ``[B, CLIP tokens + T5 length, D]`` and pooled ``[B, P]``.
        """
        batch = len(scene)
        template = torch.randint(1, len(TEMPLATES) + 1, (batch,), generator=generator)
        template *= torch.rand(batch, generator=generator) < TEMPLATE_SHARE
        rows = template * self.scenes + scene
        rows[torch.rand(batch, generator=generator) < UNCONDITIONAL_SHARE] = len(self.pooled) - 1
        shares = torch.tensor(list(T5_LENGTHS.values()))
        choice = int(torch.multinomial(shares, 1, generator=generator).item())
        extra = list(T5_LENGTHS)[choice] - T5_ENCODED
        return F.pad(self.context[rows], (0, 0, 0, extra)), self.pooled[rows]


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusion3Pipeline, scenes: list[Scene]) -> PromptTable:
    """Encode every training prompt once; the text encoders stay as they are."""
    prompts = [template.format(s.prompt) for template in ("{}", *TEMPLATES) for s in scenes]
    context, _, pooled, _ = pipeline.encode_prompt(
        [*prompts, ""],
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=T5_ENCODED,
    )
    return PromptTable(context, pooled, len(scenes))


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    scene: Tensor,
    generator: torch.Generator,
    settings: FlowSettings,
) -> SD3Transformer2DModel:
    """Train the transformer by rectified flow matching and return its moving average.

    With ``x_t = (1 - t) x_0 + t noise`` the model predicts ``noise - x_0`` (mean square error).
    ``t`` is logit-normal, partly uniform, then shifted: ``t <- s t / (1 + (s - 1) t)``.

    Args:
        pipeline: gives the transformer (trained in place) and the text encoders (fixed).
        latents: ``[N, C, h, w]`` from :func:`encode_scenes`.
        scene: ``[N]`` int64, index in ``all_scenes()``.
        generator: CPU generator of everything random.
        settings: steps, learning rates, decay.
    """
    transformer = pipeline.transformer
    zero_initialize(transformer)
    transformer.train()
    average = copy.deepcopy(transformer).eval().requires_grad_(False)
    prompts = encode_prompts(pipeline, all_scenes())
    optimizers = _optimizers(transformer, settings)
    progress = tqdm(range(settings.steps), desc="transformer", unit="step")
    running = math.nan
    for step in progress:
        for optimizer, learning_rate in optimizers:
            _set_learning_rate(optimizer, learning_rate, step / settings.steps)
        rows = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        context, pooled = prompts.draw(scene[rows], generator)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        t = _draw_timesteps(settings.batch_size, generator)
        mix = t[:, None, None, None]
        velocity = transformer(
            hidden_states=(1 - mix) * clean + mix * noise,
            timestep=1000 * t,
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
        loss = F.mse_loss(velocity, noise - clean)
        transformer.zero_grad()
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        with torch.no_grad():
            # a short memory at first, or the average would keep the initial weights for long
            decay = min(settings.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(
                list(average.parameters()), list(transformer.parameters()), 1 - decay
            )
        if step % 20 == 0:
            running = loss.item() if math.isnan(running) else 0.8 * running + 0.2 * loss.item()
            progress.set_postfix(loss=f"{running:.4f}")
    return average


def _optimizers(
    transformer: SD3Transformer2DModel, settings: FlowSettings
) -> list[tuple[Optimizer, float]]:
    """Muon on the matrices of the blocks, AdamW on embeddings, output, biases and norms."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in transformer.named_parameters():
        inner = name.startswith("transformer_blocks") and parameter.ndim == 2
        (matrices if inner else rest).append(parameter)
    return [
        (Muon(matrices, lr=settings.muon_lr), settings.muon_lr),
        (
            AdamW(rest, lr=settings.adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
            settings.adam_lr,
        ),
    ]


def _draw_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(batch, generator=generator).sigmoid()
    uniform = torch.rand(batch, generator=generator)
    t = torch.where(torch.rand(batch, generator=generator) < UNIFORM_SHARE, uniform, normal)
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def _draw(scenes: list[Scene], count: int, generator: torch.Generator) -> list[Scene]:
    return [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]


def _set_learning_rate(optimizer: Optimizer, learning_rate: float, done: float) -> None:
    """Warm up over the first hundredth, hold, and fall linearly to zero over the last half."""
    factor = min(1.0, done / 0.01 + 0.02, 2.0 * (1.0 - done))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * factor
