"""The ocr reward: its formula by hand, and readings of rendered pictures with expected scores."""

from __future__ import annotations

import socket
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gardo.config import RewardsConfig
from gardo.data.files import read_prompt_file
from gardo.data.generators.ocr import ocr_prompts
from gardo.rewards.ocr import OCRReward, edit_distance, normalise, quoted_text, text_score
from gardo.rewards.registry import build_reward
from gardo.rewards.scoring import RewardSet
from gardo.types import UserError
from tests.rewards.pictures import write

# --- the formula


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "abc", 3),
        ("kitten", "sitting", 3),  # k -> s, e -> i, + g
        ("flaw", "lawn", 2),  # - f, + n
        ("abc", "cba", 2),
        ("saturday", "sunday", 3),  # - a, - t, r -> n
    ],
)
def test_edit_distances_by_hand(first, second, expected):
    assert edit_distance(first, second) == expected


words = st.text(alphabet="abc", max_size=6)


@given(words, words, words)
def test_the_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("openlate", "openlate", 1.0),
        ("weareopenlatetoday", "openlate", 1.0),  # contained
        ("openlata", "openlate", 7 / 8),
        ("opnlate", "openlate", 7 / 8),
        ("openlates", "openlate", 1.0),  # contained
        ("oopenlata", "openlate", 6 / 8),
        ("", "openlate", 0.0),
        ("xxxxxxxxxxxxxxxxxxxxxx", "openlate", 0.0),  # distance 22, counted as 8
    ],
)
def test_scores_by_hand(text, target, expected):
    assert text_score(text, target) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign "Open" and a sign "Closed"', "Open"),
        ("a sign “Open Late” at night", "Open Late"),
        ('a sign “The "Best" Cake”', 'The "Best" Cake'),
        ('a sign "The “Best” Cake"', "The “Best” Cake"),
        ('a baker’s sign that says "Bob\'s"', "Bob's"),
        ('“a” then "b"', "a"),
        ('a 12" pizza', None),
        ("a sign ”Open“", None),
        ("a sign 'Open'", None),
        ('a sign ""', ""),
        ("", None),
    ],
)
def test_the_first_pair_of_quotes(prompt, expected):
    assert quoted_text(prompt) == expected


def test_normalisation_drops_spaces_and_case():
    assert normalise(" Open  LATE ") == "openlate"


# --- readings


@pytest.fixture(scope="module")
def reward():
    return build_reward("ocr", workers=2)


def score(reward, text, *images):
    prompts = [f'a sign that says "{text}"'] * len(images)
    return reward.score(torch.cat(images), prompts, [{}] * len(images))


@pytest.mark.parametrize(
    "font",
    [None, "DejaVuSans.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneralBolIta.ttf", "cmr10.ttf"],
    ids=lambda font: font or "Pillow",
)
def test_readable_text_scores_one_and_a_wrong_letter_its_share(reward, font):
    images = [write("Hello World", font), write("Hello Word", font), write("Hallo World", font)]
    output = score(reward, "Hello World", *images)
    # ten letters: one missing and one wrong are one edit each
    assert output.scores.tolist() == pytest.approx([1.0, 0.9, 0.9], abs=1e-6)
    assert output.details["exact"].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [16, 24, 56])
def test_sizes(reward, size):
    output = score(reward, "Fresh Bread", write("Fresh Bread", size=size))
    assert output.scores.tolist() == [1.0]


@pytest.mark.parametrize("angle", [-30, -10, 10, 30])
def test_rotations(reward, angle):
    output = score(reward, "Open 24 Hours", write("Open 24 Hours", size=34, angle=angle))
    assert output.scores.tolist() == [1.0]


def test_colors_and_several_lines(reward):
    lines = write("Grand\nOpening\nToday", "DejaVuSans.ttf", color="navy", background="orange")
    assert score(reward, "Grand Opening Today", lines).scores.tolist() == [1.0]
    # further text costs nothing as long as the target is contained
    assert score(reward, "opening", lines).scores.tolist() == [1.0]


def test_upside_down_text_needs_the_option(reward):
    image = write("Hello World", "STIXGeneral.ttf", angle=180)
    assert score(reward, "Hello World", image).scores.item() < 1
    turning = OCRReward(workers=1, upside_down=True)
    assert score(turning, "Hello World", image).scores.item() == 1


def test_blank_noisy_and_broken_images(reward):
    blank = torch.ones(1, 3, 64, 64)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    broken = torch.full((1, 3, 64, 64), torch.nan)
    output = score(reward, "Hello", blank, noise, broken)
    assert output.scores[:2].tolist() == [0.0, 0.0]
    assert output.scores[2].isnan()
    assert output.details["exact"][2].isnan()
    assert output.scores.dtype == torch.float32


def test_a_sample_scores_the_same_in_any_batch_and_order(reward):
    texts = ["Hello", "World", "Hallo", "Welt"]
    images = torch.cat([write(text) for text in texts])
    prompts = [f'"{text}"' for text in ["Hello", "Hello", "Hello", "Welt"]]
    together = reward.score(images, prompts, [{}] * 4).scores
    # World against hello: w->h, o->e, r->l, l, d->o
    assert together.tolist() == pytest.approx([1.0, 0.2, 0.8, 1.0])
    assert torch.equal(reward.score(images[2:3], prompts[2:3], [{}]).scores, together[2:3])
    with torch.inference_mode():
        backwards = reward.score(images.flip(0).half(), prompts[::-1], [{}] * 4).scores
    assert torch.equal(backwards.flip(0), together)
    assert reward.score(images[:0], [], []).scores.shape == (0,)


def test_the_wheel_brings_the_models(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the reader wants to download something")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    fresh = OCRReward(workers=1, upside_down=True)  # with all three models
    assert score(fresh, "Hello", write("Hello")).scores.tolist() == [1.0]


# --- prompts and parameters


def test_prompts_without_quotes_are_listed_with_their_lines(tmp_path):
    good = 'a sign "Open"\na sign “Open”\n'
    file = tmp_path / "train.txt"
    file.write_text(good + "".join(f"a cat {i}\n" for i in range(11)) + 'a sign ""\n')
    rewards = RewardSet(
        RewardsConfig(proxy="ocr", parameters={"ocr": {"workers": 1}}), torch.device("cpu")
    )
    with pytest.raises(UserError) as caught:
        rewards.check_prompts(read_prompt_file(file))
    lines = str(caught.value).split("\n")
    assert len(lines) == 11
    assert lines[0].startswith(f'{file}, line 3 "a cat 0": ocr: expected a text in quotes')
    assert lines[9].startswith(f'{file}, line 12 "a cat 9": ocr: ')
    assert lines[10] == "... and 2 more"
    file.write_text(good)
    rewards.check_prompts(read_prompt_file(file))
    rewards.check_prompts(ocr_prompts(size=100))


def test_prompts_without_quotes_are_refused_by_score(reward):
    assert "nothing between" in reward.check_prompt('a sign "  "', {})
    with pytest.raises(ValueError, match="expected a text in quotes"):
        reward.score(torch.ones(1, 3, 32, 32), ["a cat"], [{}])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"workers": 0}, "workers: expected an integer >= 1, got 0"),
        ({"workers": 1.5}, "workers: expected an integer >= 1, got 1.5"),
        ({"min_confidence": 2}, "min_confidence: expected a number in"),
    ],
)
def test_wrong_parameters_are_named(parameters, expected):
    with pytest.raises(UserError, match=expected):
        build_reward("ocr", **parameters)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"'{package}': pip install 'gardo\\[ocr\\]'"):
        build_reward("ocr")
