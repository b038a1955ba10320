"""Built-in prompts: records as GenEval writes them, mixes, held-out words, seeds."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from gardo.config import PromptsConfig
from gardo.data.coco import CLASSES, COLORS, GENEVAL_COLORS, TASKS
from gardo.data.generators.counting import counting_prompts
from gardo.data.generators.geneval import geneval_prompts
from gardo.data.generators.ocr import SCENES, TEST_WORDS, TRAIN_WORDS, WORDS, ocr_prompts
from gardo.data.generators.vocabulary import allocate
from gardo.data.prompts import load_prompts
from gardo.types import UserError


def config(generator, per_epoch=1, split="train", **parameters):
    return PromptsConfig(
        generator=generator, per_epoch=per_epoch, split=split, parameters=parameters
    )


def texts(prompts):
    return [p.text for p in prompts]


def tags(prompts):
    return Counter(p.metadata["tag"] for p in prompts)


def test_the_vocabulary_is_that_of_geneval():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert len(COLORS) == len(set(COLORS)) == 11
    assert set(COLORS) - set(GENEVAL_COLORS) == {"gray"}
    assert {"computer mouse", "tv remote", "computer keyboard", "airplane", "couch"} <= {*CLASSES}


# One record of each task, written down by hand in the format of GenEval's metadata.
ONE = {"classes": ["apple", "scissors"], "colors": ["orange", "blue"], "counts": [3]}


@pytest.mark.parametrize(
    ("task", "capacity", "text", "metadata"),
    [
        (
            "single_object",
            2,
            "a photo of an apple",
            {"tag": "single_object", "include": [{"class": "apple", "count": 1}]},
        ),
        (
            "two_object",
            2,
            "a photo of a scissors and an apple",
            {
                "tag": "two_object",
                "include": [{"class": "scissors", "count": 1}, {"class": "apple", "count": 1}],
            },
        ),
        (
            "counting",
            2,
            "a photo of three scissorses",
            {
                "tag": "counting",
                "include": [{"class": "scissors", "count": 3}],
                "exclude": [{"class": "scissors", "count": 4}],
            },
        ),
        (
            "colors",
            4,
            "a photo of an orange apple",
            {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "orange"}]},
        ),
        (
            "position",
            8,
            "a photo of a scissors left of an apple",
            {
                "tag": "position",
                "include": [
                    {"class": "apple", "count": 1},
                    {"class": "scissors", "count": 1, "position": ["left of", 0]},
                ],
            },
        ),
        (
            "color_attr",
            4,
            "a photo of a blue scissors and an orange apple",
            {
                "tag": "color_attr",
                "include": [
                    {"class": "scissors", "count": 1, "color": "blue"},
                    {"class": "apple", "count": 1, "color": "orange"},
                ],
            },
        ),
    ],
)
def test_records_of_each_task(task, capacity, text, metadata):
    prompts = geneval_prompts(size=capacity, mix={task: 1}, **ONE)
    assert len(set(texts(prompts))) == capacity  # all different, and all of them found
    assert {p.text: p.metadata for p in prompts}[text] == metadata
    with pytest.raises(ValueError, match=f"at most the {capacity} different prompts"):
        geneval_prompts(size=capacity + 1, mix={task: 1}, **ONE)


def test_the_default_covers_all_tasks_classes_and_colors():
    prompts = load_prompts(config("geneval", per_epoch=1000))
    assert len(prompts) == 1000
    assert tags(prompts).keys() == set(TASKS)
    clauses = [c for p in prompts for c in p.metadata["include"]]
    assert {c["class"] for c in clauses} == set(CLASSES)
    assert {c["color"] for c in clauses if "color" in c} == set(COLORS)
    assert not [c for c in clauses if c["class"] == "person" and "color" in c]
    for prompt in prompts:
        if prompt.metadata["tag"] == "color_attr":
            first, second = prompt.metadata["include"]
            assert first["color"] != second["color"]
            assert first["class"] != second["class"]


def test_the_mix_is_kept_and_filled_up():
    prompts = geneval_prompts(size=100, mix={"position": 3, "colors": 1, "counting": 0})
    assert tags(prompts) == {"position": 75, "colors": 25}
    # 80 single objects are all there are
    prompts = geneval_prompts(size=300, mix={"single_object": 1, "two_object": 1})
    assert tags(prompts) == {"single_object": 80, "two_object": 220}


def test_allocation_by_hand():
    # the quotients 53/1, 24/1, 23/1, 53/3, 53/5, 24/3 and 23/3 are above 53/7
    shares = allocate(7, {"a": 53, "b": 24, "c": 23}, {"a": 9, "b": 9, "c": 9})
    assert shares == {"a": 3, "b": 2, "c": 2}
    shares = allocate(4, {"a": 9, "b": 1, "c": 0}, {"a": 1, "b": 9, "c": 9})
    assert shares == {"a": 1, "b": 3, "c": 0}


def test_seeds_splits_and_order():
    first = texts(geneval_prompts(size=200, seed=1))
    assert texts(geneval_prompts(size=200, seed=1)) == first
    assert texts(geneval_prompts(size=200, seed=2)) != first
    starts = tags(geneval_prompts(size=500)[:100])
    assert len(starts) >= 5  # the tasks are mixed, not one after another
    assert texts(counting_prompts(size=50, seed=1)) == texts(counting_prompts(size=50, seed=1))
    assert texts(counting_prompts(size=50, seed=1)) != texts(counting_prompts(size=50, seed=2))
    assert texts(ocr_prompts(size=50, seed=1)) == texts(ocr_prompts(size=50, seed=1))
    assert texts(ocr_prompts(size=50, seed=1)) != texts(ocr_prompts(size=50, seed=2))


def test_held_out_classes_are_in_the_test_split_alone():
    held_out = {"held_out_classes": ["dog", "apple", "couch"], "held_out_counts": [4]}
    train = geneval_prompts(size=800, **held_out)
    test = geneval_prompts(size=100, split="test", **held_out)
    for prompt in train:
        for clause in prompt.metadata["include"]:
            assert clause["class"] not in {"dog", "apple", "couch"}
            assert clause["count"] != 4
    assert tags(test).keys() == set(TASKS)
    for prompt in test:
        assert {c["class"] for c in prompt.metadata["include"]} <= {"dog", "apple", "couch"}
        if prompt.metadata["tag"] == "counting":
            assert prompt.metadata["include"][0]["count"] == 4


def test_held_out_counts_alone_leave_counting_to_the_test_split():
    test = geneval_prompts(size=80, split="test", held_out_counts=[2])
    assert tags(test) == {"counting": 80}
    assert {p.metadata["include"][0]["count"] for p in test} == {2}
    train = counting_prompts(size=100, held_out_counts=[5, 6])
    assert {p.metadata["include"][0]["count"] for p in train} == {1, 2, 3, 4}
    test = counting_prompts(size=100, split="test", held_out_counts=[5, 6])
    assert {p.metadata["include"][0]["count"] for p in test} == {5, 6}


def test_counting_prompts_say_what_their_records_say():
    prompts = counting_prompts(size=300, classes=["dog", "bus"], counts=range(1, 26))
    words = {1: "one dog", 2: "two dogs", 10: "ten dogs", 11: "11 dogs", 25: "25 dogs"}
    words_bus = {1: "one bus", 3: "three buses"}
    for prompt in prompts:
        clause = prompt.metadata["include"][0]
        assert prompt.metadata["exclude"] == [{**clause, "count": clause["count"] + 1}]
        expected = (words if clause["class"] == "dog" else words_bus).get(clause["count"])
        if expected:
            assert re.search(rf"\b{expected}\b", prompt.text)
    assert len(set(texts(prompts))) == 300


def test_ocr_prompts_quote_one_text():
    prompts = ocr_prompts(size=2000, lengths=(1, 3))
    assert len(set(texts(prompts))) == 2000
    lengths = Counter()
    for prompt in prompts:
        scene, text, rest = prompt.text.split('"')
        assert f'{scene}"{{}}"{rest}' in SCENES
        lengths[len(text.split())] += 1
        assert {w.lower() for w in text.split()} <= set(TRAIN_WORDS)
    assert lengths.keys() == {1, 3}
    assert abs(lengths[1] - 1000) < 150  # 6.7 standard deviations of 1000 ± 22
    test = ocr_prompts(size=500, split="test")
    found = {w.lower() for p in test for w in p.text.split('"')[1].split()}
    assert found <= set(TEST_WORDS)
    assert not set(TEST_WORDS) & set(TRAIN_WORDS)
    assert len(WORDS) == len(set(WORDS))


@pytest.mark.parametrize(
    ("generator", "parameters", "expected"),
    [
        ("geneval", {"sizes": 3}, "has no 'sizes' (it has: size, seed, mix"),
        ("geneval", {"size": 0}, "size: expected an integer >= 1, got 0"),
        ("geneval", {"size": "many"}, "size: expected an integer >= 1, got 'many'"),
        ("geneval", {"mix": {"counts": 1}}, "mix: expected the tasks single_object"),
        ("geneval", {"mix": {"counting": -1}}, "weight >= 0 for counting, got -1"),
        ("geneval", {"mix": {"counting": 0}}, "expected a positive weight"),
        ("geneval", {"mix": "counting"}, "mix: expected task: weight"),
        ("geneval", {"classes": ["dog", "unicorn"]}, "got 'unicorn'"),
        ("geneval", {"classes": "dog"}, "classes: expected a list, got 'dog'"),
        ("geneval", {"classes": ["dog", "dog"]}, "different values"),
        ("geneval", {"colors": ["mauve"]}, "got 'mauve'"),
        ("geneval", {"counts": [0]}, "counts: expected an integer >= 1, got 0"),
        ("geneval", {"counts": [True]}, "counts: expected an integer >= 1, got True"),
        ("geneval", {"held_out_classes": ["unicorn"]}, "expected some of classes, got 'unicorn'"),
        ("counting", {"held_out_counts": [9]}, "expected some of counts, got 9"),
        ("counting", {"size": 10**6}, "at most the 2880 different prompts"),
        ("ocr", {"lengths": []}, "at least one number of words"),
        ("ocr", {"lengths": [1], "size": 10**6}, "size: expected at most"),
        ("shapes", {"size": 3}, "has no 'size' (it has: counts)"),
    ],
)
def test_wrong_parameters_are_named(generator, parameters, expected):
    with pytest.raises(UserError, match="prompts.parameters") as caught:
        load_prompts(config(generator, **parameters))
    assert expected in str(caught.value)


@pytest.mark.parametrize("generator", ["shapes", "geneval", "ocr", "counting"])
def test_wrong_splits_are_named(generator):
    with pytest.raises(UserError, match="split: expected 'train'"):
        load_prompts(config(generator, split="validation"))


def test_a_test_split_needs_something_held_out():
    with pytest.raises(UserError, match="expected held_out_classes or held_out_counts"):
        load_prompts(config("geneval", split="test"))
