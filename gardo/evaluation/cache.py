"""Images, scores and measurements on disk, under names that say everything they depend on."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gardo.run.metrics import write_atomic
from gardo.types import UserError

FORMAT = 1
"""Goes up when the same settings come to give other images or numbers."""


@dataclass
class Record:
    """What is known of one image, or of one measurement.

    Attributes:
        name: hash of the key.
        key: everything that it depends on, as JSON values.
        values: what was found so far, as JSON values.
    """

    name: str
    key: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    image_hash: str | None = None


class EvaluationCache:
    """A JSON file per record, with a PNG beside it where the record is an image's.

    Both are written atomically, the PNG first. A file that is not as it was written is named,
    ignored and written again.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self._tell = tell

    def path(self, name: str, suffix: str) -> Path:
        """Where a record's file is; subfolders keep folders small."""
        return self.folder / name[:2] / f"{name}{suffix}"

    def find(self, key: Mapping[str, Any]) -> Record | None:
        """The record of a key, or None if it is missing or damaged."""
        name = content_name(key)
        path = self.path(name, ".json")
        data = _read(path)
        if data is None:
            return None
        record = _parse(name, key, data)
        if record is None:
            self._tell(f"cache: '{path}' is damaged and is made again")
            return None
        if record.image_hash is not None:
            image = self.path(name, ".png")
            png = _read(image)
            if png is None or hashlib.sha256(png).hexdigest() != record.image_hash:
                state = "missing" if png is None else "damaged"
                self._tell(f"cache: '{image}' is {state} and is made again")
                return None
        return record

    def new(self, key: Mapping[str, Any], image: Tensor | None = None) -> Record:
        """A record without values; ``image`` is ``[3, H, W]`` in [0, 1] and is written at once."""
        record = Record(content_name(key), key)
        if image is not None:
            png = encode_png(image)
            record.image_hash = hashlib.sha256(png).hexdigest()
            self._write(self.path(record.name, ".png"), png)
            self.save(record)
        return record

    def save(self, record: Record) -> None:
        """Write the record as it is now."""
        body = {"key": record.key, "image_sha256": record.image_hash, "values": record.values}
        body["checksum"] = content_name(body)
        self._write(self.path(record.name, ".json"), (json.dumps(body, indent=1) + "\n").encode())

    def image(self, record: Record) -> Tensor:
        """``[3, H, W]`` float32 in [0, 1], as the PNG has it."""
        return decode_png(self.path(record.name, ".png").read_bytes())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomic(path, data)
        except OSError as error:
            raise UserError(
                f"'{path}' cannot be written: {error.strerror or error}; what was drawn before is "
                "kept, and the same command goes on from there"
            ) from None


def content_name(value: Any) -> str:
    """SHA-256 of JSON values, 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None


def _parse(name: str, key: Mapping[str, Any], data: bytes) -> Record | None:
    try:
        body = json.loads(data)
        checksum = body.pop("checksum")
        if checksum != content_name(body) or content_name(body["key"]) != name:
            return None
        return Record(name, key, dict(body["values"]), body["image_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def encode_png(image: Tensor) -> bytes:
    """PNG of an image ``[3, H, W]`` in [0, 1], rounded to 8 bits."""
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Tensor:
    """``[3, H, W]`` float32 in [0, 1]."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
        pixels = np.asarray(file.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def encode_vector(vector: Tensor) -> str:
    """A float32 vector as text, bit by bit."""
    return base64.b64encode(vector.float().cpu().numpy().astype("<f4").tobytes()).decode("ascii")


def decode_vector(text: str) -> Tensor:
    """What `encode_vector` wrote, ``[D]`` float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
