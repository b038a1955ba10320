"""The whole geneval reward: on tiny checkpoints, and on painted images with a stand-in detector."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from gardo.config import RewardsConfig
from gardo.data.generators.geneval import geneval_prompts
from gardo.rewards.geneval import rules
from gardo.rewards.geneval.colors import crop_object
from gardo.rewards.geneval.reward import MODES, GenEvalReward
from gardo.rewards.geneval.rules import Detection
from gardo.rewards.registry import build_reward
from gardo.rewards.scoring import RewardSet
from gardo.types import UserError
from tests.rewards.tiny_detectors import FOLDERS
from tests.rewards.tiny_models import clip_folder, images


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(clip_folder(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(make(tmp_path_factory.mktemp(name))) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module", params=FOLDERS)
def reward(request, folders, clip):
    return build_reward(
        "geneval",
        detector=folders[request.param],
        clip=clip,
        threshold=0.2,
        counting_threshold=0.25,
        nms_threshold=0.9,
    )


def batch():
    return images(6, 64)[:, :, :48]


def records(reward):
    """A record of each task about classes that the detector finds in the images."""
    found = [sorted({d.name for d in one}) for one in reward.detector(batch(), 0.2)]
    names = [(some * 2)[:2] if some else ["dog", "cat"] for some in found]
    names = [[a, b if b != a else "zebra"] for a, b in names]
    clauses = [
        [{"class": names[0][0], "count": 1}],
        [{"class": names[1][0], "count": 1}, {"class": names[1][1], "count": 1}],
        [{"class": names[2][0], "count": 3}],
        [{"class": names[3][0], "count": 1, "color": "red"}],
        [
            {"class": names[4][0], "count": 1},
            {"class": names[4][1], "count": 1, "position": ["above", 0]},
        ],
        [
            {"class": names[5][0], "count": 1, "color": "blue"},
            {"class": names[5][1], "count": 2, "color": "gray"},
        ],
    ]
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    return [{"tag": tag, "include": some} for tag, some in zip(tags, clauses, strict=True)]


def score(reward, pictures, metadata):
    return reward.score(pictures, ["a photo"] * len(pictures), metadata)


def test_scores_are_the_rules_on_detections_and_colors(reward):
    metadata = records(reward)
    output = score(reward, batch(), metadata)
    assert output.scores.dtype == torch.float32
    assert torch.equal(output.scores, output.details["soft"])
    for i, (image, record) in enumerate(zip(batch(), metadata, strict=True)):
        parsed = rules.parse_record(record)
        (found,) = reward.detector(image[None], 0.2)
        objects = rules.select_objects(found, parsed.tag, reward.limits)
        colors = {}
        for index, some in rules.colored_objects(parsed, objects).items():
            clause = parsed.include[index]
            crops = [crop_object(image, d) for d in some]
            names, wanted = [clause.name] * len(crops), [clause.color] * len(crops)
            colors[index] = reward.colors(crops, names, wanted)
        expected = rules.judge(parsed, objects, colors, reward.limits)
        for mode in MODES:
            assert output.details[mode][i].item() == pytest.approx(float(getattr(expected, mode)))


def test_a_sample_scores_the_same_in_any_batch_and_order(reward):
    metadata = records(reward)
    together = score(reward, batch(), metadata).details
    for i in range(6):
        alone = score(reward, batch()[i : i + 1], metadata[i : i + 1]).details
        for mode in MODES:
            assert torch.equal(alone[mode], together[mode][i : i + 1])
    order = [3, 0, 5, 1, 4, 2]
    shuffled = score(reward, batch()[order], [metadata[i] for i in order]).details
    for mode in MODES:
        assert torch.equal(shuffled[mode], together[mode][order])
    assert score(reward, batch()[:0], []).scores.shape == (0,)


def test_broken_images_are_missing_and_bad_input_is_refused(reward):
    metadata = records(reward)
    whole = score(reward, batch(), metadata).scores
    broken = batch().clone()
    broken[2, 0, 0, 0] = torch.nan
    output = score(reward, broken, metadata)
    assert output.scores.isnan().tolist() == [i == 2 for i in range(6)]
    assert output.details["strict"].isnan().tolist() == [i == 2 for i in range(6)]
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(output.scores[rest], whole[rest])
    with pytest.raises(ValueError, match="images: expected shape"):
        score(reward, batch()[0], [])
    with pytest.raises(ValueError, match="metadata: tag"):
        score(reward, batch()[:1], [{}])
    with pytest.raises(ValueError):
        score(reward, batch(), metadata[:3])


# --- painted images: rectangles of a colour, found by their colour


class Finder:
    """Finds a red dog in red, a green cat in green, with masks; each pure colour is one object."""

    PAINT = (("dog", 0), ("cat", 1))

    def __init__(self):
        self.names = {0: "dog", 1: "cat"}
        self.device = torch.device("cpu")

    def __call__(self, pictures, min_score):
        return [
            [
                Detection(name, 0.95, (*self.corner(mask), *self.corner(mask, last=True)), mask)
                for name, channel in self.PAINT
                if (mask := picture[channel] == 1).any()
            ]
            for picture in pictures
        ]

    @staticmethod
    def corner(mask, last=False):
        edge = -1 if last else 0
        row, column = mask.any(1).nonzero()[edge], mask.any(0).nonzero()[edge]
        return float(column + last), float(row + last)


def name_by_pixels(crops, names, wanted):
    """The colour of the brightest channel."""
    return [("red", "green", "blue")[int(crop.mean((1, 2)).argmax())] for crop in crops]


@pytest.fixture
def painter(folders, clip):
    reward = GenEvalReward(detector=folders["detr"], clip=clip)
    reward.detector, reward.colors = Finder(), name_by_pixels
    reward.classes = frozenset({"dog", "cat"})
    return reward


def paint(dog=None, cat=None):
    """Rectangles (left, top, right, bottom) on black, red for the dog, green for the cat."""
    picture = torch.zeros(1, 3, 100, 100)
    for channel, box in enumerate((dog, cat)):
        if box:
            left, top, right, bottom = box
            picture[0, channel, top:bottom, left:right] = 1
    return picture


def test_painted_images_get_their_verdicts(painter):
    left, right = (5, 40, 25, 60), (70, 40, 90, 60)

    def cat_of_dog(relation):
        clauses = [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "position": [relation, 0]},
        ]
        return {"tag": "position", "include": clauses}

    def colored(dog, cat):
        clauses = [
            {"class": "dog", "count": 1, "color": dog},
            {"class": "cat", "count": 1, "color": cat},
        ]
        return {"tag": "color_attr", "include": clauses}

    cases = [
        (paint(dog=left, cat=right), cat_of_dog("right of"), 1.0),
        (paint(dog=left, cat=right), cat_of_dog("left of"), 0.75),
        (paint(dog=left), cat_of_dog("right of"), 1 / 3),
        (paint(dog=left, cat=right), colored("red", "green"), 1.0),
        (paint(dog=left, cat=right), colored("green", "green"), 0.75),
        (paint(cat=right), colored("red", "green"), 0.5),
    ]
    pictures = torch.cat([picture for picture, _, _ in cases])
    output = score(painter, pictures, [record for _, record, _ in cases])
    assert output.scores.tolist() == pytest.approx([soft for _, _, soft in cases])
    assert output.details["strict"].tolist() == [1, 0, 0, 1, 0, 0]
    assert output.details["official"].tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_chooses_the_score(folders, clip, mode):
    reward = GenEvalReward(detector=folders["mask2former"], clip=clip, mode=mode, threshold=0.2)
    output = score(reward, batch(), records(reward))
    assert torch.equal(output.scores, output.details[mode])


# --- prompts and parameters


def test_prompts_are_checked(reward):
    assert all(reward.check_prompt(p.text, p.metadata) is None for p in geneval_prompts(size=300))
    assert "metadata: tag" in reward.check_prompt("a photo of a dog", {})
    many = {"tag": "counting", "include": [{"class": "dog", "count": 17}]}
    assert "at most max_objects = 16, got 17" in reward.check_prompt("dogs", many)


def test_classes_that_the_detector_lacks_are_named(painter):
    record = {"tag": "single_object", "include": [{"class": "zebra", "count": 1}]}
    assert painter.check_prompt("a zebra", record) == "the detector does not know the class 'zebra'"


def test_one_clip_is_shared(folders, clip):
    parameters = {
        "geneval": {"detector": folders["detr"], "clip": clip},
        "clipscore": {"path": clip},
    }
    config = RewardsConfig(proxy="geneval", aux=["clipscore"], parameters=parameters)
    rewards = RewardSet(config, torch.device("cpu"))
    assert rewards["geneval"].colors.clip is rewards["clipscore"].clip


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"mode": "hard"}, "mode: expected one of soft, strict, official; got 'hard'"),
        ({"max_objects": 0}, "max_objects: expected an integer >= 1, got 0"),
        ({"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"nms_threshold": -1}, r"nms_threshold: expected a number in \[0, 1\], got -1"),
        ({"detector_dtype": "fp8"}, "dtype: expected fp32, fp16 or bf16, got 'fp8'"),
    ],
)
def test_wrong_parameters_are_named(folders, parameters, expected):
    with pytest.raises(UserError, match=expected):
        build_reward("geneval", **{"detector": folders["detr"], **parameters})


def test_a_missing_package_is_named_with_its_extra(folders, clip, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else find_spec(name)
    )
    with pytest.raises(UserError, match="'scipy': pip install 'gardo\\[geneval\\]'"):
        build_reward("geneval", detector=folders["mask2former"], clip=clip)
