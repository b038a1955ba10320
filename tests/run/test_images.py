import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from gardo.run import images as module
from gardo.run.images import caption, image_grid, read_index, save_grid, save_image

GAP = 8  # pixels around cells


def solid(colour, batch=1, size=24):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(batch, 3, size, size)


def find(image, colour):
    """Bounding box (x, y, width, height) of the pixels of one colour."""
    ys, xs = np.nonzero((np.asarray(image) == colour).all(-1))
    return xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1


def test_small_images_are_enlarged_by_whole_pixels():
    picture = torch.zeros(1, 3, 24, 24)
    picture[0, 0, 3, 5] = 1.0  # one red pixel at x 5, y 3
    grid = image_grid(picture, [""], columns=1)
    x, y, width, height = find(grid, (255, 0, 0))
    assert (width, height) == (4, 4)  # 24 -> 96
    assert (x - GAP, y - GAP) == (20, 12)
    colours = {c for _, c in grid.getcolors()}
    assert colours == {(0, 0, 0), (255, 0, 0), (255, 255, 255)}  # nearest: nothing is mixed


@pytest.mark.parametrize(
    ("size", "scale", "side"),
    [
        (24, None, 96),
        (32, None, 96),
        (64, None, 128),
        (96, None, 96),
        (200, None, 200),
        (256, None, 256),
        (512, None, 256),
        (1024, None, 256),
        (24, 2, 48),
        (512, 0.25, 128),
        (512, 1, 512),
    ],
)
def test_size_of_a_cell(size, scale, side):
    grid = image_grid(solid((0.0, 1.0, 0.0), size=size), [""], columns=1, scale=scale)
    assert find(grid, (0, 255, 0))[2:] == (side, side)


def test_images_are_laid_out_in_rows():
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    pictures = torch.cat([solid(c) for c in colours])
    grid = image_grid(pictures, ["one", "two", "three"], columns=2)
    boxes = [find(grid, tuple(int(255 * v) for v in c)) for c in colours]
    assert boxes[0][:2] == (GAP, GAP)
    assert boxes[1][:2] == (GAP + 96 + GAP, GAP)
    assert boxes[2][0] == GAP
    assert boxes[2][1] >= GAP + 96 + 10  # below the captions of the first row
    assert grid.width == 2 * 96 + 3 * GAP


def test_values_are_rounded_clamped_and_broken_ones_are_seen():
    picture = torch.zeros(1, 3, 96, 96)
    picture[0, :, :32] = 0.5  # 127.5 rounds to the even 128
    picture[0, :, 32:64] = 1.7
    picture[0, 1, 64:] = torch.nan
    grid = np.asarray(image_grid(picture, [""], columns=1))
    column = grid[GAP : GAP + 96, GAP]
    assert (column[:32] == 128).all()
    assert (column[32:64] == 255).all()
    assert (column[64:] == (255, 0, 255)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes_give_the_same_picture(dtype):
    picture = (torch.arange(3 * 8 * 8).view(1, 3, 8, 8) % 5) / 4  # exact in every dtype
    expected = image_grid(picture, ["x"], columns=1)
    assert image_grid(picture.to(dtype), ["x"], columns=1).tobytes() == expected.tobytes()


def test_captions_are_drawn_wrapped_and_cut():
    blank = solid((1.0, 1.0, 1.0))
    heights = [
        image_grid(blank, [c], columns=1).height
        for c in ["", "one", "one\ntwo", "word " * 8, "word " * 500]
    ]
    line = heights[1] - heights[0]
    assert line >= 10
    assert heights[2] == heights[0] + 2 * line
    assert heights[0] + 2 * line <= heights[3] <= heights[0] + 4 * line
    assert heights[4] == heights[0] + 4 * line  # MAX_LINES
    written = np.asarray(image_grid(blank, ["one"], columns=1))[GAP + 96 :]
    assert (written < 128).any()


def test_lines_fit_their_cell_even_without_spaces():
    font = ImageFont.load_default(12)
    for text in ("w" * 60, "a b " + "supercalifragilistic " * 3, "x" * 100_000):
        lines = module._wrap(text, font, 96)
        assert len(lines) == 4
        assert all(0 < font.getlength(line) <= 96 for line in lines)
        assert lines[-1].endswith("...")
    assert module._wrap("one  two", font, 96) == ["one two"]


def test_scores_survive_a_long_prompt_and_stay_with_their_names():
    text = caption("word " * 100, {"count": 0.5, "shape": float("nan"), "clean": 1.0})
    lines = [line for line, _ in module._Text(text, 12, 96)._lines]
    assert lines[4:] == ["count 0.50,", "shape -,", "clean 1.00"]
    wide = [line for line, _ in module._Text(text, 12, 200)._lines]
    assert wide[4:] == ["count 0.50, shape -, clean 1.00"]


def test_only_the_first_paragraph_is_dark():
    colours = [c for _, c in module._Text("many words " * 5 + "\nscore", 12, 96)._lines]
    assert colours[0] == colours[1] == (32, 33, 36)
    assert colours[-1] == (95, 99, 104)


@pytest.mark.parametrize("text", ["naïve", "круг", "κύκλος", "±·…"])
def test_letters_beyond_ascii_are_drawn_not_boxed(text):
    font = module._font(text, 12)
    missing = bytes(font.getmask("\U0010ffff"))
    assert all(bytes(font.getmask(c)) != missing for c in text)


@pytest.mark.parametrize(
    "text",
    [
        "naïve façade",
        "三个红色的圆",
        "три круга 🔴🔴🔴",
        "\ud800 lone",
        "tab\tnul\x00bell\x07",
        "عربى עברית",
        "e\u0301\u200d\ufeff",
        "   ",
        "\n\n",
    ],
)
def test_any_text_can_be_a_caption(text):
    image_grid(solid((0.0, 0.0, 0.0)), [text], columns=1, title=text)


def test_any_text_can_be_a_caption_without_freetype(monkeypatch):
    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr(ImageFont, "load_default", lambda size: bitmap)
    image_grid(solid((0.0, 0.0, 0.0)), ["三个 naïve 🔴"], columns=1, title="три")


def test_title_takes_its_own_room():
    picture = solid((1.0, 0.0, 0.0))
    plain = find(image_grid(picture, [""], columns=1), (255, 0, 0))
    titled = find(image_grid(picture, [""], columns=1, title="epoch 3"), (255, 0, 0))
    assert titled[1] >= plain[1] + 14


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": torch.zeros(2, 1, 4, 4)}, ValueError, r"images.*\(2, 1, 4, 4\)"),
        ({"images": torch.zeros(0, 3, 4, 4), "captions": []}, ValueError, "images"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"images": [1, 2]}, TypeError, "list"),
        ({"captions": ["a"]}, ValueError, "captions: expected 2 .* got 1"),
        ({"columns": 0}, ValueError, "columns"),
        ({"scale": 0.0}, ValueError, "scale"),
    ],
)
def test_wrong_arguments_are_named(change, error, text):
    arguments = {"images": torch.zeros(2, 3, 4, 4), "captions": ["a", "b"], "columns": 2}
    with pytest.raises(error, match=text):
        image_grid(**{**arguments, **change})


def test_save_image_writes_a_png_and_no_leftovers(tmp_path):
    path = save_image(Image.new("RGB", (5, 7), (1, 2, 3)), tmp_path / "new" / "a.png")
    with Image.open(path) as image:
        assert (image.format, image.size, image.getpixel((4, 6))) == ("PNG", (5, 7), (1, 2, 3))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_grids_are_listed_in_order_of_epochs_and_replaced(tmp_path):
    for epoch, title in [(12, "end"), (6, "?"), (0, "start"), (6, "during")]:
        save_grid(tmp_path, Image.new("RGB", (4, 4)), epoch, title)
    assert json.loads((tmp_path / "index.json").read_text()) == [
        {"file": "epoch_0000.png", "epoch": 0, "title": "start"},
        {"file": "epoch_0006.png", "epoch": 6, "title": "during"},
        {"file": "epoch_0012.png", "epoch": 12, "title": "end"},
    ]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "epoch_0000.png",
        "epoch_0006.png",
        "epoch_0012.png",
    ]


@pytest.mark.parametrize(
    "text",
    ["nope", "{}", '[{"file": "a.png"}]', '[{"file": "../a.png", "epoch": 0, "title": "x"}]'],
)
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        read_index(tmp_path / "index.json")
