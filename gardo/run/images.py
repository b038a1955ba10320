"""Captioned grids of generated images, and the folder that collects them over a run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from gardo.run.metrics import write_atomic

if TYPE_CHECKING:  # images are read through the tensor's own methods: no torch import is needed
    import numpy as np
    import torch

SMALL_CELL = 96
"""Images smaller than this many pixels are enlarged to about it."""
LARGE_CELL = 256
"""Images larger than this many pixels are reduced to it."""
MAX_LINES = 4
"""A paragraph of a caption is cut, with an ellipsis, after this many lines."""

_PAPER, _INK, _MUTED, _BROKEN = (255, 255, 255), (32, 33, 36), (95, 99, 104), (255, 0, 255)
_GAP, _PADDING = 8, 4

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(
    images: torch.Tensor,
    captions: Sequence[str],
    columns: int,
    scale: float | None = None,
    title: str | None = None,
) -> Image.Image:
    """Lay images out in rows, each with its caption below.

    Args:
        images: ``[B, 3, H, W]``, floating point, in [0, 1]; values outside are clamped and
            pixels that are not finite are painted magenta, so that they are seen.
        captions: B texts, such as those of `caption`. A newline starts a new paragraph; the
            first one is printed darker. A paragraph is wrapped to the width of its cell and cut
            after `MAX_LINES` lines.
        columns: images per row, >= 1.
        scale: factor on the side of each image. None picks one: small images are enlarged by a
            whole factor to about `SMALL_CELL` pixels (nearest neighbour, so that pixels stay
            pixels), large ones reduced to `LARGE_CELL`.
        title: a heading above the grid.

    Returns an RGB image. Raises TypeError or ValueError for a wrong type, shape or number.
    """
    pixels = _to_uint8(images)
    if len(captions) != len(pixels):
        raise ValueError(
            f"captions: expected {len(pixels)} texts, one per image, got {len(captions)}"
        )
    if columns < 1:
        raise ValueError(f"columns: expected >= 1, got {columns}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected > 0, got {scale}")

    tiles = [_resize(Image.fromarray(p), scale) for p in pixels]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    # Captions need some width even below an image that was asked for smaller.
    cell = max(tiles[0].width, SMALL_CELL)
    texts = [_Text(caption, 12, cell) for caption in captions]
    width = columns * cell + (columns + 1) * _GAP
    heading = _Text(title or "", 16, width - 2 * _GAP)
    top = _GAP + heading.height + (_GAP if heading.height else 0)
    heights = [
        tiles[0].height + _PADDING + max(t.height for t in texts[r * columns :][:columns]) + _GAP
        for r in range(rows)
    ]

    page = Image.new("RGB", (width, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(page)
    heading.draw(draw, _GAP, _GAP)
    for i, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        row, column = divmod(i, columns)
        x = _GAP + column * (cell + _GAP)
        y = top + sum(heights[:row])
        page.paste(tile, (x + (cell - tile.width) // 2, y))
        text.draw(draw, x, y + tile.height + _PADDING)
    return page


def caption(prompt: str, scores: Mapping[str, float]) -> str:
    """The caption of one image: the prompt, then its scores (a dash for one that is not finite)."""
    # No-break spaces keep a name and its number on one line.
    parts = (
        f"{name}\u00a0{value:.2f}" if math.isfinite(value) else f"{name}\u00a0-"
        for name, value in scores.items()
    )
    return " ".join(prompt.split()) + "\n" + ", ".join(parts)


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG atomically (its folder is made if missing) and return its path."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return write_atomic(path, buffer.getvalue())


def save_grid(folder: str | Path, image: Image.Image, epoch: int, title: str) -> Path:
    """Save a grid as ``epoch_0042.png`` in a run's image folder and list it in ``index.json``.

    The index is a list of ``{"file", "epoch", "title"}`` in order of epochs, which the report
    reads. A grid of an epoch that is already there is replaced. Raises ValueError for an index
    that is not such a list.
    """
    folder = Path(folder)
    path = save_image(image, folder / f"epoch_{epoch:04d}.png")
    index = folder / "index.json"
    entries = read_index(index) if index.exists() else []
    entries = [e for e in entries if e["file"] != path.name]
    entries.append({"file": path.name, "epoch": epoch, "title": title})
    entries.sort(key=lambda e: e["epoch"])
    write_atomic(index, (json.dumps(entries, indent=1) + "\n").encode("utf-8"))
    return path


def drop_grids(folder: str | Path, epoch: int) -> None:
    """Delete the grids of this epoch and later ones that `save_grid` saved.

    Also one that is not yet in the index, because a process ended before it wrote that. Raises
    ValueError for an index that cannot be read.
    """
    folder = Path(folder)
    index = folder / "index.json"
    entries = read_index(index) if index.exists() else []
    kept = [e for e in entries if e["epoch"] < epoch]
    if len(kept) < len(entries):
        write_atomic(index, (json.dumps(kept, indent=1) + "\n").encode("utf-8"))
    for path in folder.glob("epoch_*.png"):
        if path.stem.removeprefix("epoch_").isdecimal() and int(path.stem[6:]) >= epoch:
            path.unlink()


def read_index(path: str | Path) -> list[dict]:
    """Read an ``index.json``: a list of ``{"file": str, "epoch": int, "title": str}``.

    Raises ValueError naming the file when it is anything else, also when a file name would lead
    out of the folder.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list, got {type(entries).__name__}")
    for i, entry in enumerate(entries):
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("file"), str)
            and isinstance(entry.get("epoch"), int)
            and isinstance(entry.get("title"), str)
        ):
            raise ValueError(
                f"{path}, entry {i}: expected file (str), epoch (int), title (str), got {entry!r}"
            )
        if Path(entry["file"]).name != entry["file"]:
            raise ValueError(f"{path}, entry {i}: file must be a plain name, got {entry['file']!r}")
    return entries


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    import numpy as np

    if not callable(getattr(images, "is_floating_point", None)):
        raise TypeError(f"images: expected a torch tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating point tensor in [0, 1], got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images: expected shape [B, 3, H, W], B, H, W >= 1, got {tuple(images.shape)}"
        )
    array = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    broken = ~np.isfinite(array).all(axis=-1)
    pixels = np.rint(np.clip(np.nan_to_num(array), 0.0, 1.0) * 255.0).astype(np.uint8)
    pixels[broken] = _BROKEN
    return pixels


def _resize(image: Image.Image, scale: float | None) -> Image.Image:
    side = max(image.size)
    if scale is None:
        if side < SMALL_CELL:
            scale = -(-SMALL_CELL // side)
        else:
            scale = min(1.0, LARGE_CELL / side)
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


class _Text:
    """A text that is wrapped to `width` pixels, to be drawn in a font that can show it."""

    def __init__(self, text: str, size: int, width: int) -> None:
        # A lone surrogate is no character; control characters and line separators draw as boxes.
        text = text.encode("utf-8", "replace").decode("utf-8")
        paragraphs = [
            "".join(c if c.isprintable() or c == "\u00a0" else " " for c in line)
            for line in text.splitlines()
        ]
        self._font = _font("".join(paragraphs).replace("\u00a0", " "), size)
        if not isinstance(self._font, ImageFont.FreeTypeFont):  # a bitmap font, Latin-1 only
            paragraphs = [p.encode("latin-1", "replace").decode("latin-1") for p in paragraphs]
        self._lines = [
            (line, _INK if i == 0 else _MUTED)
            for i, paragraph in enumerate(paragraphs)
            for line in _wrap(paragraph, self._font, width)
        ]
        self._step = _line_height(self._font)
        self.height = len(self._lines) * self._step

    def draw(self, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for i, (line, colour) in enumerate(self._lines):
            draw.text((x, y + i * self._step), line, colour, self._font)


def _font(text: str, size: int) -> _Font:
    """Pillow's own font; where it lacks a character of the text, matplotlib's, which has more."""
    plain = ImageFont.load_default(size)
    if not isinstance(plain, ImageFont.FreeTypeFont):  # Pillow was built without FreeType
        return plain
    missing = bytes(plain.getmask("\U0010ffff"))
    if not any(bytes(plain.getmask(c)) == missing for c in set(text) if not c.isascii()):
        return plain
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size - 1)  # it is larger at the same size


def _line_height(font: _Font) -> int:
    if isinstance(font, ImageFont.FreeTypeFont):
        return sum(font.getmetrics()) + 1
    return int(font.getbbox("Ag")[3]) + 2


def _wrap(paragraph: str, font: _Font, width: int) -> list[str]:
    """Break into at most `MAX_LINES` lines of `width` pixels; too wide words are broken inside.

    No-break spaces hold words together and become plain ones.
    """
    lines: list[str] = []
    current = ""
    for word in (w.replace("\u00a0", " ") for w in paragraph.split(" ") if w):
        joined = f"{current} {word}" if current else word
        if font.getlength(joined) <= width:
            current = joined
            continue
        if current:
            lines.append(current)
        while font.getlength(word) > width and len(word) > 1 and len(lines) <= MAX_LINES:
            cut = min(len(word) - 1, width)  # hardly a character is narrower than a pixel
            while cut > 1 and font.getlength(word[:cut]) > width:
                cut -= 1
            lines.append(word[:cut])
            word = word[cut:]
        current = word
        if len(lines) > MAX_LINES:
            break
    if current:
        lines.append(current)
    if len(lines) <= MAX_LINES:
        return lines
    last = lines[MAX_LINES - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: MAX_LINES - 1], last.rstrip() + "..."]
