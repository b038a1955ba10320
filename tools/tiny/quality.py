"""How well the embedded model counts: strict accuracy of sampled images, by count and setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from tqdm import tqdm

import gardo_kernels as gk
from gardo.tiny.components import exact_count
from gardo.tiny.scenes import COLORS, IMAGE_SIZE, MAX_COUNT, NUMBERS, Scene, all_scenes

BATCH = 80
SEED = 1234  # of the images


@dataclass(frozen=True)
class SamplerSetting:
    """How images are sampled: by the pipeline's own ODE at ``noise_level`` 0, else by flow SDE."""

    num_steps: int
    guidance_scale: float
    noise_level: float = 0.0
    t5_length: int = 16

    @property
    def sampler(self) -> str:
        return f"flow SDE, noise {self.noise_level:g}" if self.noise_level else "ODE"


# The first is the documented one; then no guidance, the short trajectories that reinforcement
# learning rolls out, and the pipeline's default text length.
SETTINGS = (
    SamplerSetting(20, 1.5),
    SamplerSetting(20, 1.0),
    SamplerSetting(10, 1.0),
    SamplerSetting(10, 1.0, noise_level=0.7),
    SamplerSetting(10, 1.0, t5_length=256),
)
QUICK_SETTINGS = (SamplerSetting(2, 1.0), SamplerSetting(2, 1.0, noise_level=0.7))


def sample_images(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    setting: SamplerSetting,
    generator: torch.Generator,
) -> Tensor:
    """Sample one image per prompt: ``[B, 3, IMAGE_SIZE, IMAGE_SIZE]`` float32 in [0, 1]."""
    if setting.noise_level == 0:
        output = pipeline(
            prompt=list(prompts),
            num_inference_steps=setting.num_steps,
            guidance_scale=setting.guidance_scale,
            max_sequence_length=setting.t5_length,
            generator=generator,
            output_type="pt",
        )
        images: Tensor = output.images
        return images.float()
    return _sample_sde(pipeline, prompts, setting, generator)


@torch.no_grad()
def _sample_sde(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    setting: SamplerSetting,
    generator: torch.Generator,
) -> Tensor:
    guided = setting.guidance_scale > 1
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(
        list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=guided,
        max_sequence_length=setting.t5_length,
    )
    channels = pipeline.transformer.config.in_channels
    side = IMAGE_SIZE // pipeline.vae_scale_factor
    sample = torch.randn(len(prompts), channels, side, side, generator=generator)
    pipeline.scheduler.set_timesteps(setting.num_steps)
    sigmas = pipeline.scheduler.sigmas
    for index, timestep in enumerate(pipeline.scheduler.timesteps):

        def velocity(context: Tensor, pooled: Tensor, t: Tensor = timestep) -> Tensor:
            output = pipeline.transformer(
                hidden_states=sample,  # noqa: B023 (called at once)
                timestep=t.expand(len(sample)),  # noqa: B023
                encoder_hidden_states=context,
                pooled_projections=pooled,
                return_dict=False,
            )
            result: Tensor = output[0]
            return result

        coefficients = gk.sde_coefficients(
            sigmas[index],
            sigmas[index + 1],
            noise_level=setting.noise_level,
            kind="flow",
            sigma_max=float(sigmas[1]),
        )
        sample = gk.sde_step(
            velocity(context, pooled),
            sample,
            coefficients,
            noise=torch.randn(sample.shape, generator=generator),
            velocity_uncond=velocity(negative, negative_pooled) if guided else None,
            guidance_scale=setting.guidance_scale,
        ).prev_sample
    vae = pipeline.vae
    latents = sample / vae.config.scaling_factor + vae.config.shift_factor
    decoded: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def accuracy_by_count(
    pipeline: StableDiffusion3Pipeline,
    setting: SamplerSetting,
    images_per_prompt: int = 10,
    counts: Sequence[int] = range(1, MAX_COUNT + 1),
    seed: int = SEED,
) -> dict[int, float]:
    """Share of strictly correct images (:func:`~gardo.tiny.components.exact_count`) per count."""
    generator = torch.Generator().manual_seed(seed)
    scenes: list[Scene] = all_scenes(counts) * images_per_prompt
    correct = []
    chunks = [scenes[i : i + BATCH] for i in range(0, len(scenes), BATCH)]
    for chunk in tqdm(chunks, desc=f"{setting.num_steps} steps, {setting.sampler}", unit="batch"):
        images = sample_images(pipeline, [scene.prompt for scene in chunk], setting, generator)
        asked = torch.tensor([scene.count for scene in chunk])
        colors = torch.tensor([COLORS[scene.color] for scene in chunk])
        correct.append(exact_count(images, asked, colors))
    correct_all = torch.cat(correct).float()
    count_of = torch.tensor([scene.count for scene in scenes])
    return {count: correct_all[count_of == count].mean().item() for count in counts}


def measure(
    folder: Path,
    images_per_prompt: int = 10,
    settings: Sequence[SamplerSetting] = SETTINGS,
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """Accuracy of a saved pipeline at every one of the settings.

    Returns:
        one record per setting: the setting's fields, ``accuracy`` by count, and ``mean``.
    """
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    records = []
    for setting in settings:
        accuracy = accuracy_by_count(pipeline, setting, images_per_prompt, seed=seed)
        mean = sum(accuracy.values()) / len(accuracy)
        records.append({**asdict(setting), "accuracy": accuracy, "mean": mean})
    return records


def write_quality(
    folder: Path, records: Sequence[dict[str, Any]], facts: dict[str, str | float]
) -> None:
    """Write ``quality.json`` and the same as a table, ``QUALITY.md``, into the given folder."""
    content = {"facts": facts, "records": list(records)}
    (folder / "quality.json").write_text(json.dumps(content, indent=2) + "\n")
    counts = list(records[0]["accuracy"])
    head = ["steps", "sampler", "guidance", "T5 length", *(NUMBERS[n - 1] for n in counts), "all"]
    lines = [
        "# Quality of the embedded model",
        "",
        "Strict accuracy: the connected components of the prompted colour are as many as asked,",
        "each of a sensible size, and no pixel has another colour. The saved weights (float16),",
        "computed in float32.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for record in records:
        setting = SamplerSetting(*(record[name] for name in SamplerSetting.__dataclass_fields__))
        cells = [
            str(setting.num_steps),
            setting.sampler,
            f"{setting.guidance_scale:g}",
            str(setting.t5_length),
            *(f"{value:.2f}" for value in record["accuracy"].values()),
            f"{record['mean']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    (folder / "QUALITY.md").write_text("\n".join(lines))
