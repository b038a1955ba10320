"""What reward servers and their clients say to each other: PNG or safetensors, and JSON.

A request to score carries the images in one of two content types:

- `SAFETENSORS`: one tensor ``images [B, 3, H, W]``, floating point in [0, 1] or uint8, and the JSON
  object ``{"prompts": [...], "metadata": [...]}`` as the entry ``request`` of the file's metadata;
- `JSON`: ``{"images": [base64 of a PNG, ...], "prompts": [...], "metadata": [...]}``.

The answer is ``{"scores": [...], "details": {name: [...]}}``, with ``"sigma": [...]`` too where the
reward states its uncertainty, and null for what is missing; or ``{"error": text}`` with a status
from 400 on. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gardo.rewards.base import RewardSpec
from gardo.types import RewardOutput

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
_DTYPES = ("F32", "F16", "BF16", "U8")


class ProtocolError(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes at once.

    Attributes:
        body_bytes: size of a request's body.
        images: images of a request.
        side: height and width of an image in pixels.
    """

    body_bytes: int = 256 * 2**20
    images: int = 256
    side: int = 4096

    def check(self, count: int, height: int, width: int) -> None:
        """Raises ProtocolError 413 for too many or too large images."""
        if count > self.images:
            raise ProtocolError(413, f"images: expected at most {self.images}, got {count}")
        if max(height, width) > self.side:
            raise ProtocolError(
                413, f"images: expected sides of at most {self.side} pixels, got {height} x {width}"
            )


@dataclass(frozen=True)
class ScoreRequest:
    """Images ``[B, 3, H, W]`` floating point in [0, 1] with their ``B`` prompts and metadata."""

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)


def encode_request(
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    encoding: str = "safetensors",
) -> tuple[bytes, str]:
    """The body of a request and its content type.

    Args:
        images: ``[B, 3, H, W]`` floating point in [0, 1], B >= 1.
        prompts: ``B`` texts.
        metadata: ``B`` records of JSON values.
        encoding: ``safetensors`` (images as they are) or ``png`` (rounded to 8 bits).

    Raises:
        TypeError, ValueError: metadata that JSON cannot hold.
    """
    request: dict[str, Any] = {"prompts": list(prompts), "metadata": [dict(m) for m in metadata]}
    if encoding == "png":
        request["images"] = [base64.b64encode(png).decode("ascii") for png in _to_pngs(images)]
        return to_json(request), JSON
    tensor = images.detach().cpu().contiguous()
    return save({"images": tensor}, metadata={"request": json.dumps(request)}), SAFETENSORS


def decode_request(body: bytes, content_type: str, limits: Limits) -> ScoreRequest:
    """Read and check the body of a request to score.

    Raises:
        ProtocolError: 400 malformed, 413 over a limit, 415 another content type, 422 wrong values.
    """
    if content_type == SAFETENSORS:
        request, images = _from_safetensors(body, limits)
    elif content_type == JSON:
        request = parse_json(body)
        images = _from_pngs(request.get("images"), limits)
    else:
        raise ProtocolError(415, f"expected {SAFETENSORS} or {JSON}, got '{content_type}'")
    prompts, metadata = read_prompts(request)
    if len(prompts) != len(images):
        raise ProtocolError(422, f"prompts: expected {len(images)}, got {len(prompts)}")
    inside = (images >= 0) & (images <= 1) | ~images.isfinite()
    if not inside.all():
        raise ProtocolError(422, "images: expected values in [0, 1]")
    return ScoreRequest(images, prompts, metadata)


def to_json(value: Mapping[str, Any]) -> bytes:
    """An object as JSON. Raises TypeError or ValueError for what JSON cannot hold."""
    return json.dumps(value).encode("ascii")


def parse_json(body: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises ProtocolError 400 for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, f"expected a JSON object, got {type(value).__name__}")
    return value


def read_prompts(request: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts and metadata of a request, as many of one as of the other; else ProtocolError 422."""
    prompts, metadata = request.get("prompts"), request.get("metadata")
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise ProtocolError(422, "prompts: expected a list of strings")
    if not isinstance(metadata, list) or not all(isinstance(m, dict) for m in metadata):
        raise ProtocolError(422, "metadata: expected a list of objects")
    if len(metadata) != len(prompts):
        raise ProtocolError(422, f"metadata: expected {len(prompts)}, got {len(metadata)}")
    return prompts, metadata


def _from_safetensors(body: bytes, limits: Limits) -> tuple[dict[str, Any], Tensor]:
    # the header is read first: it has the JSON part, and the sizes before memory is taken
    length = struct.unpack("<Q", body[:8])[0] if len(body) >= 8 else 0
    if not 2 <= length <= len(body) - 8:
        raise ProtocolError(400, "not safetensors: no header")
    header = parse_json(body[8 : 8 + length])
    record = header.pop("__metadata__", None)
    text = record.get("request") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ProtocolError(400, "expected the entry 'request' in the safetensors metadata")
    info = header.get("images")
    if list(header) != ["images"] or not isinstance(info, dict):
        raise ProtocolError(422, f"expected one tensor 'images', got {sorted(header)}")
    if info.get("dtype") not in _DTYPES:
        raise ProtocolError(422, f"images: expected one of {_DTYPES}, got {info.get('dtype')!r}")
    shape = info.get("shape")
    sizes = shape if isinstance(shape, list) and all(type(n) is int for n in shape) else []
    if len(sizes) != 4 or sizes[1] != 3 or min(sizes) < 0 or 0 in sizes[2:]:
        raise ProtocolError(422, f"images: expected shape [B, 3, H, W], got {shape!r}")
    limits.check(sizes[0], sizes[2], sizes[3])
    try:
        images = load(body)["images"]
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ProtocolError(400, f"not safetensors: {error}") from None
    return parse_json(text), images.float() / 255 if info["dtype"] == "U8" else images


def _from_pngs(texts: Any, limits: Limits) -> Tensor:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ProtocolError(422, "images: expected a list of base64 strings")
    limits.check(len(texts), 0, 0)
    images = [_from_png(number, text, limits) for number, text in enumerate(texts)]
    if len({image.shape for image in images}) > 1:
        raise ProtocolError(422, "images: expected one size for all of a request")
    return torch.stack(images) if images else torch.zeros(0, 3, 1, 1)


def _from_png(number: int, text: str, limits: Limits) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            limits.check(1, file.height, file.width)  # before anything is decompressed
            if file.mode not in ("RGB", "RGBA", "L", "LA", "P"):
                raise ProtocolError(422, f"image {number}: expected 8 bits, got mode {file.mode}")
            pixels = np.array(file.convert("RGB"))
    except Image.DecompressionBombError:
        raise ProtocolError(413, f"image {number}: too many pixels") from None
    except (binascii.Error, ValueError, OSError, SyntaxError, struct.error, zlib.error) as error:
        raise ProtocolError(400, f"image {number}: not a PNG in base64: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _to_pngs(images: Tensor) -> list[bytes]:
    from PIL import Image

    pixels = (images.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    files = []
    for array in pixels.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
        files.append(buffer.getvalue())
    return files


def scores_to_json(output: RewardOutput) -> dict[str, Any]:
    """The answer to a request; float32 values survive the way there and back unchanged."""
    details = {name: _to_list(values) for name, values in output.details.items()}
    answer: dict[str, Any] = {"scores": _to_list(output.scores), "details": details}
    return answer if output.sigma is None else {**answer, "sigma": _to_list(output.sigma)}


def scores_from_json(answer: Mapping[str, Any], count: int) -> RewardOutput:
    """The scores of ``count`` images from an answer, on the CPU.

    Raises:
        ValueError: the answer is no answer to a request with so many images.
    """
    details = answer.get("details")
    if not isinstance(details, dict):
        raise ValueError("details: expected an object")
    sigma = answer.get("sigma")
    return RewardOutput(
        _from_list("scores", answer.get("scores"), count),
        {str(k): _from_list(str(k), v, count) for k, v in details.items()},
        None if sigma is None else _from_list("sigma", sigma, count),
    )


def _to_list(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _from_list(name: str, values: Any, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: expected a list of {count}")
    if not all(v is None or type(v) in (int, float) for v in values):
        raise ValueError(f"{name}: expected numbers and null")
    return torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float32)


def spec_to_json(spec: RewardSpec) -> dict[str, Any]:
    """What a server tells of a reward."""
    return {
        "higher_is_better": spec.higher_is_better,
        "value_range": list(spec.value_range),
        "needs_prompt": spec.needs_prompt,
        "batch_size": spec.batch_size,
        "dtype": None if spec.dtype is None else str(spec.dtype).removeprefix("torch."),
    }


def spec_from_json(data: Any) -> RewardSpec:
    """The spec of a reward that a server scores, in batches of the server's choice.

    Raises:
        ValueError: not the description of a reward.
    """
    if not isinstance(data, dict):
        raise ValueError("expected an object")
    better, needs = data.get("higher_is_better"), data.get("needs_prompt")
    bounds = data.get("value_range")
    if not isinstance(better, bool) or not isinstance(needs, bool):
        raise ValueError("higher_is_better, needs_prompt: expected true or false")
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ValueError("value_range: expected a pair")
    if not all(b is None or type(b) in (int, float) for b in bounds):
        raise ValueError("value_range: expected numbers or null")
    low, high = (None if b is None else float(b) for b in bounds)
    return RewardSpec(better, (low, high), needs, remote=True)
