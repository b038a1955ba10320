"""GenEval's rules on synthetic detections; expected verdicts and scores are worked out by hand."""

from __future__ import annotations

import pytest

from gardo.data.coco import TASKS
from gardo.data.generators.geneval import geneval_prompts
from gardo.rewards.geneval.rules import (
    Detection,
    Limits,
    Verdict,
    colored_objects,
    judge,
    overlap,
    parse_record,
    relative_position,
    select_objects,
)

OFFICIAL = Limits()


def seen(name, x=50, y=50, score=0.95, size=20):
    """A square object with its centre at (x, y)."""
    half = size / 2
    return Detection(name, score, (x - half, y - half, x + half, y + half))


def verdict(metadata, detections, colors=(), limits=OFFICIAL):
    """Judge detections; ``colors`` are the colours by clause of the objects that are asked for."""
    record = parse_record(metadata)
    objects = select_objects(detections, record.tag, limits)
    asked = colored_objects(record, objects)
    named = dict(zip(asked, colors, strict=True))
    assert {i: len(c) for i, c in named.items()} == {i: len(o) for i, o in asked.items()}
    return judge(record, objects, named, limits)


def scores(official, strict, soft):
    return Verdict(official, strict, pytest.approx(soft))


SINGLE = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
TWO = {
    "tag": "two_object",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
}
COUNTING = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 3}],
    "exclude": [{"class": "dog", "count": 4}],
}
COLORS = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]}
POSITION = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ],
}
COLOR_ATTR = {
    "tag": "color_attr",
    "include": [
        {"class": "car", "count": 1, "color": "red"},
        {"class": "bus", "count": 1, "color": "blue"},
    ],
}


@pytest.mark.parametrize(
    ("dogs", "expected"),
    [
        (0, scores(False, False, 0.0)),
        (1, scores(True, True, 1.0)),
        (2, scores(True, False, 0.0)),  # 1 - |1 - 2| / 1
        (4, scores(True, False, -2.0)),  # 1 - |1 - 4| / 1
    ],
)
def test_single_object(dogs, expected):
    found = [seen("dog", x=50 * i) for i in range(dogs)] + [seen("cat")] * 3
    assert verdict(SINGLE, found) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("dog cat", scores(True, True, 1.0)),
        ("cat dog sheep sheep", scores(True, True, 1.0)),
        ("dog", scores(False, False, 0.5)),
        ("dog dog cat", scores(True, False, 0.5)),
        ("sheep", scores(False, False, 0.0)),
        ("", scores(False, False, 0.0)),
    ],
)
def test_two_object(names, expected):
    assert verdict(TWO, [seen(name) for name in names.split()]) == expected


@pytest.mark.parametrize(
    ("dogs", "expected"),
    [
        (3, scores(True, True, 1.0)),
        (2, scores(False, False, 2 / 3)),
        (4, scores(False, False, 2 / 3)),  # excluded
        (0, scores(False, False, 0.0)),
        (7, scores(False, False, -1 / 3)),
    ],
)
def test_counting(dogs, expected):
    assert verdict(COUNTING, [seen("dog", x=40 * i) for i in range(dogs)]) == expected


def test_without_an_exclusion_more_are_enough_for_the_official_verdict():
    open_ended = {**COUNTING, "exclude": []}
    assert verdict(open_ended, [seen("dog")] * 5) == scores(True, False, 1 / 3)


def test_an_excluded_class_of_its_own():
    no_cats = {**SINGLE, "exclude": [{"class": "cat", "count": 1}]}
    assert verdict(no_cats, [seen("dog")]) == scores(True, True, 1.0)
    # the training scores do not look at exclusions
    assert verdict(no_cats, [seen("dog"), seen("cat")]) == scores(False, True, 1.0)


@pytest.mark.parametrize(
    ("cars", "colors", "expected"),
    [
        (1, [["red"]], scores(True, True, 1.0)),
        (1, [["orange"]], scores(False, False, 0.5)),
        (0, [], scores(False, False, 0.0)),
        # one too many: the count and the colour score 0, but the best car is a red one
        (2, [["red"]], scores(True, False, 0.0)),
        (2, [["blue"]], scores(False, False, 0.0)),
    ],
)
def test_colors(cars, colors, expected):
    found = [seen("car", score=0.9 - 0.1 * i) for i in range(cars)]
    assert verdict(COLORS, found, colors) == expected


def test_several_objects_of_a_color():
    three = {"tag": "colors", "include": [{"class": "car", "count": 3, "color": "red"}]}
    cars = [seen("car", x=30 * i) for i in range(3)]
    assert verdict(three, cars, [["red", "red", "blue"]]) == scores(False, False, (1 + 2 / 3) / 2)
    assert verdict(three, cars, [["red"] * 3]) == scores(True, True, 1.0)


@pytest.mark.parametrize(
    ("names", "colors", "expected"),
    [
        ("car bus", [["red"], ["blue"]], scores(True, True, 1.0)),
        ("car bus", [["blue"], ["red"]], scores(False, False, 0.5)),  # (1 + 0 + 1 + 0) / 4
        ("car bus", [["red"], ["red"]], scores(False, False, 0.75)),
        ("car", [["red"]], scores(False, False, 0.5)),  # (1 + 1 + 0 + 0) / 4
        ("bus", [["blue"]], scores(False, False, 0.5)),
        ("", [], scores(False, False, 0.0)),
        ("car car bus", [["red"], ["blue"]], scores(True, False, 0.5)),  # (0 + 0 + 1 + 1) / 4
    ],
)
def test_color_attribution(names, colors, expected):
    assert verdict(COLOR_ATTR, [seen(name) for name in names.split()], colors) == expected


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([seen("dog", 80), seen("cat", 20)], scores(True, True, 1.0)),
        # in the wrong place: (1 + 1 + 0 + 1) / 4, the last 1 is a quirk of the reward server
        ([seen("dog", 20), seen("cat", 80)], scores(False, False, 0.75)),
        ([seen("dog", 50), seen("cat", 50)], scores(False, False, 0.75)),
        # nothing to compare with: (0 + 1 + 0) / 3
        ([seen("cat", 20)], scores(False, False, 1 / 3)),
        ([seen("dog", 80)], scores(False, False, 1 / 3)),  # (1 + 0 + 0) / 3
        ([], scores(False, False, 0.0)),
        # a second dog: the best one counts officially, the training scores have no target
        (
            [seen("dog", 80, score=0.9), seen("dog", 5, score=0.5), seen("cat", 20)],
            scores(True, False, 1 / 3),
        ),
        (
            [seen("dog", 80, score=0.5), seen("dog", 5, score=0.9), seen("cat", 20)],
            scores(False, False, 1 / 3),
        ),
    ],
)
def test_position(detections, expected):
    assert verdict(POSITION, detections) == expected


def test_all_objects_must_be_in_place():
    cats = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 2, "position": ["above", 0]},
        ],
    }
    dog = seen("dog", 50, 90)
    assert verdict(cats, [dog, seen("cat", 45, 30), seen("cat", 60, 20)]).strict
    assert not verdict(cats, [dog, seen("cat", 45, 30), seen("cat", 60, 95)]).strict


def test_a_colored_clause_with_a_position():
    both = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "color": "black", "position": ["left of", 0]},
        ],
    }
    there = [seen("dog", 80), seen("cat", 20)]
    assert verdict(both, there, [["black"]]) == scores(True, True, 1.0)
    # with the wrong colour the position is not asked: (1 + 1 + 0) / 3
    assert verdict(both, there, [["white"]]) == scores(False, False, 2 / 3)
    assert verdict(both, [seen("dog", 80)]) == scores(False, False, 1 / 3)  # (1 + 0 + 0) / 3


# --- which objects count


def test_thresholds_are_exclusive_and_counting_has_its_own():
    at = [seen("dog", score=0.3), seen("dog", score=0.301), seen("dog", score=0.9)]
    assert [d.score for d in select_objects(at, "single_object", OFFICIAL)["dog"]] == [0.9, 0.301]
    assert select_objects(at, "counting", OFFICIAL) == {}
    over = [*at, seen("dog", score=0.901)]
    assert [d.score for d in select_objects(over, "counting", OFFICIAL)["dog"]] == [0.901]


def test_at_most_sixteen_of_a_class_the_most_confident_ones():
    many = [seen("dog", x=30 * i, score=0.31 + i / 100) for i in range(20)]
    kept = select_objects([*many, seen("cat")], "two_object", OFFICIAL)
    assert [d.score for d in kept["dog"]] == [d.score for d in reversed(many)][:16]
    assert len(kept["cat"]) == 1


def test_suppression_is_off_by_default_and_keeps_the_most_confident():
    # boxes of 20 + 1 pixels, shifted by 7: intersection 14 of 28 columns, 0.5 exactly
    pair = [seen("dog", 50, score=0.8), seen("dog", 57, score=0.9), seen("cat", 50, score=0.5)]
    assert len(select_objects(pair, "two_object", OFFICIAL)["dog"]) == 2
    same_place = [seen("dog"), seen("dog")]
    assert len(select_objects(same_place, "two_object", OFFICIAL)["dog"]) == 2
    halved = select_objects(pair, "two_object", Limits(nms=0.5))
    assert [d.score for d in halved["dog"]] == [0.9]
    assert len(halved["cat"]) == 1  # another class
    assert len(select_objects(pair, "two_object", Limits(nms=0.51))["dog"]) == 2
    # one that is dropped drops no other
    row = [seen("dog", 50, score=0.9), seen("dog", 57, score=0.8), seen("dog", 64, score=0.7)]
    assert [d.score for d in select_objects(row, "two_object", Limits(nms=0.5))["dog"]] == [
        *(0.9, 0.7),
    ]
    # the number of objects is limited first
    limited = Limits(nms=0.5, max_objects=2)
    assert [d.score for d in select_objects(row, "two_object", limited)["dog"]] == [0.9]


def test_overlap_by_hand():
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap((0, 0, 9, 9), (9, 9, 18, 18)) == pytest.approx(1 / 199)


# --- positions

TARGET = (40.0, 40.0, 60.0, 60.0)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (46, 50, set()),  # 4 of 4 pixels are tolerance
        (45, 50, set()),  # (5 - 4) / 5 = 0.2
        (42, 50, set()),  # (8 - 4) / 8 = 0.5 is not more than a half
        (41, 50, {"left of"}),  # 5 / 9
        (59, 50, {"right of"}),
        (50, 41, {"above"}),
        (50, 59, {"below"}),
        (30, 30, {"left of", "above"}),  # 16 / 28.3 = 0.57 in both
        (70, 30, {"right of", "above"}),
        (20, 35, {"left of"}),  # 26 / 33.5 and 11 / 33.5
        (50, 50, set()),
    ],
)
def test_relative_positions_by_hand(x, y, expected):
    box = (x - 10.0, y - 10.0, x + 10.0, y + 10.0)
    assert relative_position(box, TARGET, threshold=0.1) == expected


def test_larger_objects_must_be_further_apart():
    wide = (0.0, 40.0, 60.0, 60.0)  # centre 30, tolerance 0.1 x (60 + 20) = 8; (20 - 8) / 20
    assert relative_position(wide, TARGET, 0.1) == {"left of"}
    assert relative_position(wide, TARGET, 0.13) == set()  # (20 - 10.4) / 20
    assert relative_position((41.0, 40.0, 59.0, 60.0), TARGET, 0.0) == set()
    assert relative_position((39.0, 40.0, 59.0, 60.0), TARGET, 0.0) == {"left of"}


# --- records


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "tag: expected one of single_object"),
        ({**SINGLE, "tag": "counted"}, "got 'counted'"),
        ({"tag": "counting"}, "include: expected a list of clauses, got None"),
        ({"tag": "counting", "include": []}, "include: expected at least one clause"),
        ({"tag": "counting", "include": "dog"}, "expected a list of clauses, got 'dog'"),
        ({"tag": "counting", "include": ["dog"]}, "include[0]: expected an object, got 'dog'"),
        ({**SINGLE, "include": [{"class": "unicorn", "count": 1}]}, "got 'unicorn'"),
        ({**SINGLE, "include": [{"class": "dog"}]}, "count: expected an integer >= 1, got None"),
        ({**SINGLE, "include": [{"class": "dog", "count": 0}]}, "got 0"),
        ({**SINGLE, "include": [{"class": "dog", "count": True}]}, "got True"),
        ({**SINGLE, "include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "got 'mauve'"),
        (
            {**SINGLE, "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
            "index of an earlier clause], got ['above', 0]",
        ),
        (
            {**TWO, "include": [*SINGLE["include"], {**SINGLE["include"][0], "position": "above"}]},
            "got 'above'",
        ),
        (
            {
                **TWO,
                "include": [
                    *SINGLE["include"],
                    {"class": "cat", "count": 1, "position": ["near", 0]},
                ],
            },
            "got ['near', 0]",
        ),
        ({**SINGLE, "exclude": [{"class": "cat", "count": -1}]}, "exclude[0]: count"),
    ],
)
def test_malformed_records_are_explained(metadata, expected):
    with pytest.raises(ValueError, match="metadata: ") as caught:
        parse_record(metadata)
    assert expected in str(caught.value)


def test_the_records_of_the_generator_can_be_judged():
    prompts = geneval_prompts(size=600)
    records = [parse_record(p.metadata) for p in prompts]
    assert {r.tag for r in records} == set(TASKS)
    # an image with exactly what is asked for; positions are judged above
    for record in records:
        if record.tag != "position":
            found = [seen(c.name) for c in record.include for _ in range(c.count)]
            objects = select_objects(found, record.tag, OFFICIAL)
            colors = {i: [c.color] * c.count for i, c in enumerate(record.include) if c.color}
            assert judge(record, objects, colors, OFFICIAL) == Verdict(True, True, 1.0)
