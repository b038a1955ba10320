"""Pictures with text for the rewards that read it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def write(
    text: str,
    font: str | None = None,
    size: int = 40,
    angle: float = 0.0,
    side: int = 320,
    color: str = "black",
    background: str = "white",
) -> Tensor:
    """``[1, 3, side, side]`` in [0, 1] with the text in the middle, turned counterclockwise.

    Args:
        font: file name of one of matplotlib's fonts; None: the one that Pillow brings.
    """
    image = Image.new("RGB", (side, side), background)
    face = ImageFont.truetype(FONTS / font, size) if font else ImageFont.load_default(size)
    middle = (side / 2, side / 2)
    ImageDraw.Draw(image).multiline_text(middle, text, fill=color, font=face, anchor="mm")
    turned = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=background)
    return torch.from_numpy(np.array(turned)).permute(2, 0, 1)[None] / 255
