"""What the small networks of the embedded task share: their convolutions and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gardo.tiny.scenes import IMAGE_SIZE
from gardo.types import UserError

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

Network = TypeVar("Network", bound=nn.Module)


def convolutions(inputs: int, channels: Sequence[int]) -> list[nn.Module]:
    """Four normalised 3 x 3 convolutions, which together halve the image's side twice."""
    layers: list[nn.Module] = []
    for width, stride in zip(channels, (1, 2, 2, 1), strict=True):
        layers += [
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inputs = width
    return layers


def check_size(images: Tensor) -> None:
    """Refuse images of another size than the task's.

    Raises:
        ValueError: not of shape ``[B, 3, IMAGE_SIZE, IMAGE_SIZE]``.
    """
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images: expected shape [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}"
        )


def save_network(network: nn.Module, folder: Path | str, record: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` (float16) and ``config.json`` (``record``)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / WEIGHTS_NAME
    )
    (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(kind: str, folder: Path | str) -> dict[str, Any]:
    """The ``config.json`` of a network's folder; ``kind`` is what messages call the network.

    Raises:
        UserError: a file of the folder is missing.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise UserError(f"{kind}: no '{name}' in '{folder}'")
    record: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return record


def load_weights(network: Network, folder: Path | str) -> Network:
    """Read the weights and return the network in evaluation mode and without gradients.

    Raises:
        RuntimeError: the weights do not fit the network.
    """
    network.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
    return network.requires_grad_(False).eval()
