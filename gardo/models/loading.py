"""Loads a pipeline from the hub, a folder or the package, and wraps it for training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from gardo.config import ModelConfig
from gardo.models.attention import set_attention_backend
from gardo.models.base import FlowModel
from gardo.models.flux import FluxModel
from gardo.models.pipeline import PipelineModel
from gardo.models.sd3 import SD3Model
from gardo.types import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FAMILIES: dict[str, tuple[str, type]] = {
    "sd3": ("StableDiffusion3Pipeline", SD3Model),
    "flux": ("FluxPipeline", FluxModel),
}


def load_model(config: ModelConfig, device: torch.device, precision: str) -> FlowModel:
    """Load the pipeline and freeze it.

    Raises:
        UserError: the folder or hub repository is missing, gated, incomplete or of another class.
    """
    path = resolve_path(config.path)
    class_name = pipeline_class(path, config)
    family = _family(class_name, config)
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # a bar per component says nothing
        library.utils.logging.disable_progress_bar()
    pipeline_type: Any = getattr(diffusers, FAMILIES[family][0])
    try:
        pipeline = pipeline_type.from_pretrained(
            path,
            dtype={"vae": DTYPES[config.vae_dtype or "fp32"], "default": DTYPES[precision]},
            revision=config.revision,
            variant=config.variant,
            local_files_only=Path(path).is_dir(),
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.path '{config.path}' cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    model = FAMILIES[family][1](pipeline, device, config.max_sequence_length)
    configure(model, config)
    return model


def configure(model: PipelineModel, config: ModelConfig) -> None:
    """Set what trades memory for speed. Raises UserError for an attention backend not there."""
    vae = model.pipeline.vae
    if config.vae_tiling:
        vae.enable_tiling()
    if config.vae_slicing:
        vae.enable_slicing()
    if config.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    if config.attention_backend is not None:
        set_attention_backend(model.transformer, config.attention_backend)
    if config.compile:
        model.compile_blocks()


def resolve_path(path: str) -> str:
    """Turn ``builtin:tiny`` into the folder in the package; check that a local path exists."""
    if path == "builtin:tiny":
        from gardo.tiny import pipeline_path

        return str(pipeline_path())
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    expanded = os.path.expanduser(path)
    if looks_local and not Path(expanded).is_dir():
        raise UserError(
            f"model.path '{path}': no such folder (expected a diffusers pipeline folder, a hub id "
            "such as stabilityai/stable-diffusion-3.5-medium, or builtin:tiny)"
        )
    return expanded


def pipeline_class(path: str, config: ModelConfig) -> str:
    """The pipeline's class name from its ``model_index.json``, before gigabytes are loaded."""
    if Path(path).is_dir():
        index = Path(path) / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"model.path '{config.path}': expected a diffusers pipeline folder with "
                "model_index.json, found none"
            )
    else:
        index = _download_index(path, config)
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"model.path '{config.path}': malformed {index.name}: {error}") from None


def _download_index(path: str, config: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(path, "model_index.json", revision=config.revision))
    except GatedRepoError:
        raise UserError(
            f"model.path '{path}' is gated: accept its licence at https://huggingface.co/{path} "
            "and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model.path '{path}': no such folder, and no such repository on the hub that you may "
            "read (for a private one, log in with `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model.path '{path}': no such folder, and the hub cannot be asked for it: {error}"
        ) from None


def _family(class_name: str, config: ModelConfig) -> str:
    for family, (pipeline, _) in FAMILIES.items():
        if class_name == pipeline and config.family in ("auto", family):
            return family
    wanted = (
        FAMILIES[config.family][0]
        if config.family in FAMILIES
        else " or ".join(pipeline for pipeline, _ in FAMILIES.values())
    )
    raise UserError(f"model.path '{config.path}': expected a {wanted}, got a {class_name}")
