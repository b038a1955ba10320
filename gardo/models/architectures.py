"""Architectures as configurations: what a model is made of, without downloading its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gardo.config import ModelConfig
from gardo.families import FAMILIES, Architecture
from gardo.models.loading import family_of, pipeline_class, resolve_path
from gardo.types import UserError

_TABULATED = {a.name: a for family in FAMILIES.values() for a in family.architectures}


def architecture(name: str) -> Architecture:
    """A tabulated architecture by name, or the embedded ``tiny`` from its own files."""
    if name == "tiny":
        return read_architecture(Path(resolve_path("builtin:tiny")), name)
    if name not in _TABULATED:
        known = ", ".join(sorted(_TABULATED))
        raise UserError(f"unknown architecture '{name}' (known: {known}, tiny)")
    return _TABULATED[name]


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that ``model.path`` names, without a download.

    Raises:
        UserError: neither a folder nor a hub id in the table.
    """
    by_hub = {known.hub: known for known in _TABULATED.values()}
    if config.path in by_hub:
        return by_hub[config.path]
    on_hub = config.path.count("/") == 1 and not config.path.startswith((".", "/", "~"))
    if on_hub and not Path(config.path).is_dir():
        raise UserError(
            f"model.path '{config.path}': its architecture is not tabulated (known: "
            f"{', '.join(by_hub)}); download it and give the folder"
        )
    folder = Path(resolve_path(config.path))
    pipeline_class(str(folder), config)  # one clear message if this is no pipeline
    return read_architecture(folder, "tiny" if config.path == "builtin:tiny" else folder.name)


def read_architecture(folder: Path, name: str) -> Architecture:
    """Read the configurations in a diffusers pipeline folder.

    Raises:
        UserError: a configuration is missing or malformed, or the pipeline is of another class.
    """
    index = _read(folder / "model_index.json")
    family = family_of(str(index.get("_class_name")), str(folder))
    encoders = {}
    for component in family.text_encoders:
        config = _read(folder / component / "config.json")
        encoders[component] = (str(index[component][1]), config)
    return Architecture(
        name=name,
        family=family.name,
        transformer=_read(folder / "transformer" / "config.json"),
        vae=_read(folder / "vae" / "config.json"),
        scheduler=_read(folder / "scheduler" / "scheduler_config.json"),
        text_encoders=encoders,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model file '{path}' cannot be read: {error}") from None


def build_transformer(architecture: Architecture) -> nn.Module:
    """The transformer with random weights in torch's default dtype and on its default device."""
    import diffusers

    kind: Any = getattr(diffusers, FAMILIES[architecture.family].transformer)
    return cast(nn.Module, kind.from_config(dict(architecture.transformer)))


def build_vae(architecture: Architecture) -> nn.Module:
    """The image autoencoder with random weights."""
    from diffusers import AutoencoderKL

    return cast(nn.Module, AutoencoderKL.from_config(dict(architecture.vae)))


def build_text_encoder(architecture: Architecture, component: str) -> nn.Module:
    """A text encoder with random weights, by the pipeline's name of it."""
    import transformers

    class_name, config = architecture.text_encoders[component]
    kind: Any = getattr(transformers, class_name)
    return cast(nn.Module, kind(kind.config_class(**config)))


@dataclass(frozen=True)
class Counts:
    """Numbers of a pipeline's parameters.

    Attributes:
        transformer: parameters of the transformer.
        buffers: what its checkpoint holds besides, such as SD3's table of positions.
        vae: parameters of the autoencoder.
        text_encoders: parameters of all text encoders together.
    """

    transformer: int
    buffers: int
    vae: int
    text_encoders: int


def count_parameters(architecture: Architecture) -> Counts:
    """Count parameters by building every part on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        transformer = build_transformer(architecture)
        vae = build_vae(architecture)
        encoders = [build_text_encoder(architecture, c) for c in architecture.text_encoders]
    return Counts(
        transformer=parameter_count(transformer),
        buffers=sum(t.numel() for t in transformer.state_dict().values())
        - parameter_count(transformer),
        vae=parameter_count(vae),
        text_encoders=sum(parameter_count(encoder) for encoder in encoders),
    )


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())
