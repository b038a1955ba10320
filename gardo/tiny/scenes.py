"""Scenes of the embedded image task: a prompt grammar and a synthetic renderer.

A scene is one to five shapes (circles or squares) of one colour on grey, "three red circles".
The renderer makes the pretraining data and the reference set of the held-out metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 24
CELLS = 3  # shapes stand in a jittered CELLS x CELLS grid, so they do not touch
MAX_COUNT = 5  # larger counts are never shown in pretraining
RADIUS = (2.0, 3.2)  # pixels; half the side of a square is 0.9 of it, for about equal areas
BACKGROUND = (0.5, 0.5, 0.5)
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.15),
}
SHAPES = ("circle", "square")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Scene:
    """``count`` shapes (1 to 9) of one colour."""

    count: int
    color: str
    shape: str

    @property
    def prompt(self) -> str:
        plural = "" if self.count == 1 else "s"
        return f"{NUMBERS[self.count - 1]} {self.color} {self.shape}{plural}"

    @property
    def metadata(self) -> dict[str, str | int]:
        return {"count": self.count, "color": self.color, "shape": self.shape}


def all_scenes(counts: Sequence[int] = range(1, MAX_COUNT + 1)) -> list[Scene]:
    """Every scene with the given counts, in a fixed order."""
    return [Scene(n, color, shape) for n in counts for color in COLORS for shape in SHAPES]


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of the grammar ``<number> <color> <shape>[s]``.

    Raises:
        ValueError: the prompt is not of this grammar.
    """
    words = prompt.lower().split()
    if len(words) == 3:
        number, color, shape = words[0], words[1], words[2].removesuffix("s")
        if number in NUMBERS and color in COLORS and shape in SHAPES:
            return Scene(NUMBERS.index(number) + 1, color, shape)
    raise ValueError(
        f"prompt {prompt!r}: expected '<number> <color> <shape>' with a number in {NUMBERS}, "
        f"a color in {tuple(COLORS)} and a shape in {SHAPES}"
    )


def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Draw one random image per scene, anti-aliased, shapes apart from each other.

    Args:
        scenes: ``B`` scenes with counts up to 9.
        generator: CPU generator; the same state draws the same images.

    Returns:
        ``[B, 3, IMAGE_SIZE, IMAGE_SIZE]`` float32 in [0, 1].
    """
    batch, cells = len(scenes), CELLS * CELLS
    counts = torch.tensor([scene.count for scene in scenes])
    square = torch.tensor([scene.shape == "square" for scene in scenes])
    color = torch.tensor([COLORS[scene.color] for scene in scenes])

    order = torch.rand(batch, cells, generator=generator).argsort(dim=1)  # which cells are filled
    filled = torch.zeros(batch, cells).scatter_(
        1, order, (torch.arange(cells) < counts[:, None]).float()
    )
    low, high = RADIUS
    radius = low + (high - low) * torch.rand(batch, cells, generator=generator)
    cell = IMAGE_SIZE / CELLS
    slack = (cell / 2 - 0.5 - radius).clamp(min=0)[..., None]  # keeps shapes inside their cell
    jitter = (2 * torch.rand(batch, cells, 2, generator=generator) - 1) * slack
    grid = torch.cartesian_prod(torch.arange(CELLS), torch.arange(CELLS)).float()
    center = (grid + 0.5) * cell + jitter  # [B, cells, (y, x)] in pixels

    pixel = torch.arange(IMAGE_SIZE) + 0.5
    dy = (pixel[:, None] - center[..., 0, None, None]).abs()  # [B, cells, S, 1]
    dx = (pixel[None, :] - center[..., 1, None, None]).abs()  # [B, cells, 1, S]
    r = radius[..., None, None]
    inside_circle = (r - (dy.square() + dx.square()).sqrt() + 0.5).clamp(0, 1)
    half = 0.9 * r
    inside_square = (half - dy + 0.5).clamp(0, 1) * (half - dx + 0.5).clamp(0, 1)
    inside = torch.where(square[:, None, None, None], inside_square, inside_circle)
    mask = (inside * filled[..., None, None]).amax(dim=1, keepdim=True)  # [B, 1, S, S]
    return torch.tensor(BACKGROUND).view(1, 3, 1, 1) * (1 - mask) + color[:, :, None, None] * mask
