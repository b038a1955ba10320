"""Loads a pipeline from the hub, a folder or the package, and wraps it for training."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, cast

import torch

from gardo.config import ModelConfig
from gardo.families import FAMILIES, Family
from gardo.models.attention import set_attention_backend
from gardo.models.base import FlowModel
from gardo.models.pipeline import PipelineModel
from gardo.types import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_model(config: ModelConfig, device: torch.device, precision: str) -> FlowModel:
    """Load the pipeline and freeze it.

    Raises:
        UserError: the folder or hub repository is missing, gated, incomplete or of another class.
    """
    path = resolve_path(config.path)
    family = family_of(pipeline_class(path, config), config.path, config.family)
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # a bar per component says nothing
        library.utils.logging.disable_progress_bar()
    pipeline_type: Any = getattr(diffusers, family.pipeline)
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
    model: Any = model_class(family)(pipeline, device, config.max_sequence_length)
    configure(model, config)
    return cast(FlowModel, model)


def model_class(family: Family) -> type[PipelineModel]:
    """What wraps the pipelines of a family."""
    module, _, name = family.model.partition(":")
    return cast(type[PipelineModel], getattr(importlib.import_module(module), name))


def family_of(class_name: str, path: str, wanted: str = "auto") -> Family:
    """The family of a pipeline's class.

    Args:
        class_name: as ``model_index.json`` names it.
        path: of the model, for the message.
        wanted: the family that it must be of, or auto.

    Raises:
        UserError: a class of no family, or of another one.
    """
    families = [f for f in FAMILIES.values() if wanted in ("auto", f.name)]
    for family in families:
        if family.pipeline == class_name:
            return family
    expected = " or ".join(family.pipeline for family in families)
    raise UserError(f"model.path '{path}': expected a {expected}, got a {class_name}")


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
