"""Build the embedded model from nothing: ``python -m tools.tiny.build [--out DIR] [--seed 0]``.

Renders scenes, trains the autoencoder and the transformer, saves a complete pipeline folder and
measures how well it counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gardo import cli
from gardo.argument_parser import ArgumentParser
from gardo.tiny import pipeline_path


def main(arguments: Sequence[str]) -> int:
    """Command-line entry point; returns the exit code. Raises UserError for wrong options."""
    parser = ArgumentParser(
        prog="python -m tools.tiny.build",
        description="Build the embedded Stable Diffusion 3 pipeline from scratch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=pipeline_path(), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of all data")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the transformer")
    parser.add_argument("--vae-steps", type=int, default=600, help="training steps of the VAE")
    parser.add_argument("--scenes", type=int, default=40_000, help="rendered training scenes")
    parser.add_argument(
        "--images", type=int, default=10, help="images per prompt in the quality table"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything, to see that it runs"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        if options.out.resolve() == pipeline_path():
            parser.error("--quick: expected another --out, not the folder of the shipped model")
        options.steps, options.vae_steps, options.scenes, options.images = 10, 10, 512, 1
    for name in ("steps", "vae_steps", "scenes", "images", "threads"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected at least 1, got {getattr(options, name)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # now, not after the training
    except OSError as error:
        parser.error(f"--out: expected a folder that can be made, got {options.out} ({error})")
    build(options)
    return 0


def build(options: argparse.Namespace) -> None:
    """Train, save and measure; the options are those of :func:`main`."""
    # Imported here, so that --help answers at once.
    import torch
    from diffusers.utils import logging as diffusers_logging

    from gardo.tiny.scenes import COLORS, SHAPES
    from tools.tiny.models import build_sd3_pipeline, save_pipeline
    from tools.tiny.pretrain import (
        FlowSettings,
        encode_scenes,
        train_autoencoder,
        train_transformer,
    )
    from tools.tiny.quality import QUICK_SETTINGS, SEED, SETTINGS, measure, write_quality

    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    generator = torch.Generator().manual_seed(options.seed)
    pipeline = build_sd3_pipeline(options.seed)
    error = train_autoencoder(pipeline.vae, generator, options.vae_steps)
    latents, scene = encode_scenes(pipeline.vae, options.scenes, generator)
    settings = FlowSettings(steps=options.steps)
    average = train_transformer(pipeline, latents, scene, generator, settings)
    pipeline.register_modules(transformer=average)
    save_pipeline(pipeline, options.out)
    trained = time.monotonic() - start
    sampler_settings = QUICK_SETTINGS if options.quick else SETTINGS
    records = measure(options.out, options.images, sampler_settings)
    command = (
        f"python -m tools.tiny.build --seed {options.seed} --steps {options.steps} "
        f"--vae-steps {options.vae_steps} --scenes {options.scenes} --images {options.images} "
        f"--threads {options.threads}"
    )
    facts: dict[str, str | float] = {
        "command": f"`{command}`",
        "images per count": options.images * len(COLORS) * len(SHAPES),
        "seed of the images": SEED,
        "training": f"{trained:.0f} s with {options.threads} CPU thread(s)",
        "sampling and measuring": f"{time.monotonic() - start - trained:.0f} s",
        "autoencoder, mean absolute error in [0, 1]": f"{error / 2:.4f}",
        "torch": torch.__version__,
    }
    write_quality(options.out, records, facts)
    print((options.out / "QUALITY.md").read_text())


if __name__ == "__main__":
    cli.run(main)
