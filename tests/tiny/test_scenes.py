"""The renderer draws what the prompt says; the component counter agrees with hand-made masks."""

import numpy as np
import pytest
import torch

from gardo.tiny.components import (
    color_mask,
    component_areas,
    count_components,
    exact_count,
    label_components,
)
from gardo.tiny.scenes import (
    BACKGROUND,
    COLORS,
    IMAGE_SIZE,
    Scene,
    all_scenes,
    parse_prompt,
    render,
)


def _render(scenes, seed=0):
    return render(scenes, torch.Generator().manual_seed(seed))


def _colors(scenes):
    return torch.tensor([COLORS[scene.color] for scene in scenes])


def _flood_fill_count(mask):
    """Components by an explicit stack, 8-connected: independent of the code under test."""
    mask = mask.copy()
    areas = []
    for row, column in np.argwhere(mask):
        stack, area = [(row, column)], 0
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x] = False
                area += 1
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        if area:
            areas.append(area)
    return areas


def test_prompts_read_back():
    for scene in all_scenes(range(1, 10)):
        assert parse_prompt(scene.prompt) == scene
    assert Scene(1, "red", "circle").prompt == "one red circle"
    assert Scene(3, "blue", "square").prompt == "three blue squares"
    assert len(all_scenes()) == 5 * len(COLORS) * 2


@pytest.mark.parametrize(
    "prompt", ["", "red circles", "ten red circles", "three pink circles", "three red circles now"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="expected"):
        parse_prompt(prompt)


def test_render_is_a_function_of_the_generator():
    scenes = all_scenes(range(1, 10))
    first, again, other = _render(scenes, 3), _render(scenes, 3), _render(scenes, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1


def test_rendered_scenes_hold_their_count_and_nothing_else():
    scenes = all_scenes(range(1, 10)) * 5
    images = _render(scenes)
    counts = torch.tensor([scene.count for scene in scenes])
    assert exact_count(images, counts, _colors(scenes)).all()
    assert not exact_count(images, counts + 1, _colors(scenes)).any()


def test_rendered_pixels_lie_between_background_and_color():
    scenes = all_scenes()
    images = _render(scenes)
    background = torch.tensor(BACKGROUND)
    for image, scene in zip(images, scenes, strict=True):
        color = torch.tensor(COLORS[scene.color])
        direction = color - background
        offset = image.permute(1, 2, 0) - background
        share = offset @ direction / direction.square().sum()
        # tolerance: float32 rounding of values of order one
        assert (offset - share[..., None] * direction).abs().max() < 1e-5
        assert share.min() > -1e-5
        assert share.max() < 1 + 1e-5


def test_squares_fill_their_boxes_and_circles_do_not():
    fill = {}
    for shape in ("circle", "square"):
        scenes = [Scene(1, "red", shape)] * 64
        mask = color_mask(_render(scenes), _colors(scenes))
        height = mask.any(dim=2).sum(dim=1)
        width = mask.any(dim=1).sum(dim=1)
        fill[shape] = (mask.sum(dim=(1, 2)) / (height * width)).mean().item()
    assert fill["square"] > 0.95
    assert fill["circle"] < 0.90  # pi / 4 for a large circle, more at this resolution


def test_exact_count_refuses_specks_blobs_and_other_colors():
    image = torch.tensor(BACKGROUND)[:, None, None].repeat(1, 24, 24)
    red, blue = torch.tensor(COLORS["red"]), torch.tensor(COLORS["blue"])
    image[:, 3:7, 3:7] = red[:, None, None]
    speck, blob, foreign = image.clone(), image.clone(), image.clone()
    speck[:, 20, 20] = red
    blob[:, 3:13, 3:13] = red[:, None, None]
    foreign[:, 20, 20] = blue
    images = torch.stack([image, speck, blob, foreign, image])
    colors = torch.stack([red, red, red, red, blue])
    correct = exact_count(images, torch.ones(5, dtype=torch.int64), colors)
    assert correct.tolist() == [True, False, False, False, False]


def test_components_of_hand_made_masks():
    spiral = torch.zeros(24, 24, dtype=torch.bool)
    spiral[::2] = True
    spiral[1::4, -1] = True
    spiral[3::4, 0] = True  # one component, several hundred pixels long
    two = torch.zeros(24, 24, dtype=torch.bool)
    two[0, :3] = True
    two[-1, -2:] = True
    diagonal = torch.eye(24, dtype=torch.bool)  # 8-connected: one component
    masks = torch.stack([spiral, two, diagonal, torch.zeros_like(two), torch.ones_like(two)])
    labels = label_components(masks)
    assert count_components(labels).tolist() == [1, 2, 1, 0, 1]
    assert count_components(labels, min_area=3).tolist() == [1, 1, 1, 0, 1]
    assert component_areas(labels)[1][component_areas(labels)[1] > 0].tolist() == [3, 2]
    assert component_areas(labels).sum(dim=1).tolist() == masks.sum(dim=(1, 2)).tolist()
    assert labels[~masks].eq(0).all()


@pytest.mark.parametrize("density", [0.2, 0.4, 0.6])
def test_components_agree_with_a_flood_fill(density):
    generator = torch.Generator().manual_seed(5)
    masks = torch.rand(8, 13, 9, generator=generator) < density
    labels = label_components(masks)
    areas = component_areas(labels)
    for row, mask in enumerate(masks.numpy()):
        expected = sorted(_flood_fill_count(mask))
        assert sorted(areas[row][areas[row] > 0].tolist()) == expected


def test_empty_batches_and_wrong_arguments():
    assert label_components(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4, 4)
    with pytest.raises(TypeError, match="mask: expected torch.bool"):
        label_components(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"mask: expected shape"):
        label_components(torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"images: expected shape"):
        color_mask(torch.zeros(3, 4, 4), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"colors: expected shape \[2, 3\]"):
        color_mask(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3))
