"""The words of GenEval: COCO's classes under its names, its colours, positions and number words.

Source: the evaluation code of GenEval (Ghosh et al. 2023, arXiv 2310.11513).
"""

from __future__ import annotations

CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven"),
    *("toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)

# GenEval classifies among these ten.
GENEVAL_COLORS: tuple[str, ...] = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
# The eleven basic colour terms of English (Berlin and Kay 1969): the ten and gray.
COLORS: tuple[str, ...] = (*GENEVAL_COLORS, "gray")

POSITIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
TASKS: tuple[str, ...] = (
    *("single_object", "two_object", "counting", "colors", "position", "color_attr"),
)

_NUMBERS = "zero one two three four five six seven eight nine ten".split()


def number_word(number: int) -> str:
    """``three`` for 3; digits above ten."""
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


def with_article(name: str) -> str:
    """``an apple``, ``a dog``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """GenEval's plural, which knows one rule: ``buses``, ``dogs``, but also ``knifes``."""
    return f"{name}es" if name.endswith("s") else f"{name}s"
