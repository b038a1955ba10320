"""Writes a comparison as Markdown, JSON and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gardo.evaluation.comparison import Cell, Column, Comparison
from gardo.evaluation.settings import HELD_OUT
from gardo.evaluation.statistics import Estimate
from gardo.run.metrics import to_json_line, write_atomic
from gardo.types import UserError

THUMBNAIL = 256
"""Larger images are shown in the page with this side; the files in the cache stay as they are."""
NAME = "evaluation"


@dataclass(frozen=True)
class Line:
    """A line of the table: a statistic, and what it is for each contender.

    Attributes:
        values: per contender, the value and its interval; the latter may be empty.
        marked: per contender, whether its interval leaves out what the base has by definition.
    """

    section: str
    label: str
    tag: str
    values: Sequence[tuple[str, str]]
    marked: Sequence[bool]


def write_comparison(comparison: Comparison, folder: Path, rows: int) -> Path:
    """Write ``evaluation.md``, ``.json`` and ``.html``, each atomically.

    Args:
        rows: most rows of images in the page.

    Returns:
        the path of the page.

    Raises:
        UserError: one of them cannot be written.
    """
    page = folder / f"{NAME}.html"
    try:
        write_atomic(folder / f"{NAME}.json", as_json(comparison, folder).encode())
        write_atomic(folder / f"{NAME}.md", as_markdown(comparison).encode())
        write_atomic(page, as_html(comparison, rows).encode())
    except OSError as error:
        raise UserError(f"--out '{folder}': cannot be written: {error.strerror or error}") from None
    return page


def lines(comparison: Comparison) -> list[Line]:
    """The table, line by line."""
    columns = comparison.columns
    found = [*_reward_lines(comparison)]
    if not comparison.has_base:
        return [*found, *_others(columns)]
    names = [*comparison.roles]
    weights = [list(column.contender.proxy.values()) for column in columns]
    if any(len(some) > 1 or any(w < 0 for w in some) for some in weights):
        names.append("proxy")
    title = "win rate against the base"
    for name in names:
        rates = [column.win_rates.get(name) for column in columns]
        tag = comparison.roles.get(name, "weighted sum that was trained on")
        found.append(_line(title, name, tag, rates, _percent, centre=0.5))
    gaps = [column.gap for column in columns]
    if any(gaps):
        tag = "win rate by the proxy less that by held-out rewards"
        found.append(_line("hacking", "gap", tag, gaps, _points, centre=0.0))
    return [*found, *_others(columns)]


def _reward_lines(comparison: Comparison) -> Iterator[Line]:
    for name, role in comparison.roles.items():
        tag = role if comparison.higher_is_better[name] else f"{role}, lower is better"
        means = [column.rewards[name] for column in comparison.columns]
        yield _line("mean reward", name, tag, means, _number)
    if any(any(column.missing.values()) for column in comparison.columns):
        for name in comparison.roles:
            counts = [(str(column.missing[name]), "") for column in comparison.columns]
            yield Line("images without a score", name, "", counts, [False] * len(counts))


def _others(columns: Sequence[Column]) -> Iterator[Line]:
    if any(column.diversity for column in columns):
        values = [column.diversity for column in columns]
        tag = "mean pairwise cosine distance within a prompt x 100"
        yield _line("policy", "diversity", tag, values, _number)
    if any(column.kl for column in columns):
        values = [column.kl for column in columns]
        yield _line("policy", "KL to the base", "per step and latent dimension", values, _number)


def _line(
    section: str,
    label: str,
    tag: str,
    values: Sequence[Estimate | None],
    show: Callable[[float], str],
    centre: float | None = None,
) -> Line:
    marked = [
        centre is not None and value is not None and (value.low > centre or value.high < centre)
        for value in values
    ]
    return Line(section, label, tag, [_estimate(value, show) for value in values], marked)


def _estimate(value: Estimate | None, show: Callable[[float], str]) -> tuple[str, str]:
    if value is None or not math.isfinite(value.value):
        return "–", ""
    if not math.isfinite(value.low):
        return show(value.value), ""
    return show(value.value), f"[{show(value.low)}, {show(value.high)}]"


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def as_markdown(comparison: Comparison) -> str:
    """The table and the settings; names are escaped."""
    names = [_escaped(column.contender.name) for column in comparison.columns]
    text = ["# Evaluation", ""]
    section = None
    for line in lines(comparison):
        if line.section != section:
            section = line.section
            text += ["", f"| {section} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        tag = f" ({line.tag})" if line.tag else ""
        texts = [" ".join(part for part in value if part) for value in line.values]
        cells = [f"**{v}**" if m else v for v, m in zip(texts, line.marked, strict=True)]
        text.append(f"| {_escaped(line.label)}{tag} | {' | '.join(cells)} |")
    text += ["", *(f"- {_escaped(note)}" for note in explanations(comparison)), "", "Settings:", ""]
    text += [f"- {_escaped(key)}: {_escaped(value)}" for key, value in facts(comparison)]
    text += ["", *(f"- **Note:** {_escaped(note)}" for note in comparison.notes)]
    return "\n".join(text).replace("\n\n\n", "\n\n").rstrip() + "\n"


def explanations(comparison: Comparison) -> list[str]:
    """How to read the table."""
    said = [
        f"In brackets: {comparison.settings['bootstrap']}; images of a prompt are drawn again "
        "together."
    ]
    if comparison.has_base:
        said.append(
            "Win rate: share of images that score better than the base's of the same prompt and "
            "seed, ties one half. Bold: the interval leaves out 50% (the gap's: 0)."
        )
        held_out = [name for name, role in comparison.roles.items() if role == HELD_OUT]
        if any(column.gap for column in comparison.columns):
            said.append(
                "Gap: win rate under the reward that was trained on, less the mean win rate under "
                f"the held-out ones ({', '.join(held_out)}), in percentage points. Above 0: the "
                "proxy sees more of an improvement than they do; where their win rates are below "
                "50%, too, it is being hacked. Ties, of which coarse rewards have many, pull a "
                "win rate to 50%."
            )
        if "kl" in comparison.settings:
            said.append(
                "KL: of the contender's noisy steps to the base's, on the contender's own "
                f"trajectories ({comparison.settings['kl']}), mean over steps and dimensions."
            )
    return said


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Settings and contenders, as text."""
    shown = []
    for key, value in comparison.settings.items():
        if value is None or key == "format":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        elif isinstance(value, list):
            value = ranges(value)
        shown.append((key.replace("_", " "), str(value)))
    for column in comparison.columns:
        contender = column.contender
        shown.append((contender.name, f"{contender.source.given} ({contender.described})"))
    return shown


def ranges(seeds: Sequence[int]) -> str:
    """Seeds as they can be typed: ``0-3 8``."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _escaped(text: str) -> str:
    """Text in a Markdown table, where a name must not become a cell, a tag or a link."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*[]<>|&" else c for c in flat)


def as_json(comparison: Comparison, folder: Path) -> str:
    """Everything in full precision, null for no number; paths are relative to ``folder``."""
    columns = comparison.columns

    def estimate(value: Estimate | None) -> dict[str, float] | None:
        if value is None:
            return None
        return {"value": value.value, "low": value.low, "high": value.high}

    data: dict[str, Any] = {
        "settings": dict(comparison.settings),
        "rewards": {
            name: {"role": role, "higher_is_better": comparison.higher_is_better[name]}
            for name, role in comparison.roles.items()
        },
        "contenders": {
            column.contender.name: {
                "given": column.contender.source.given,
                "weights": column.contender.described,
                "hashes": dict(column.contender.weights),
                "trained_on": dict(column.contender.proxy),
                "reward": {n: estimate(v) for n, v in column.rewards.items()},
                "missing": dict(column.missing),
                "win_rate": {n: estimate(v) for n, v in column.win_rates.items()},
                "gap": estimate(column.gap),
                "diversity": estimate(column.diversity),
                "kl": estimate(column.kl),
            }
            for column in columns
        },
        "notes": list(comparison.notes),
        "images": [
            {
                "prompt": row.prompt,
                "seed": row.seed,
                "contenders": {
                    column.contender.name: {
                        "file": os.path.relpath(cell.file, folder),
                        "scores": dict(cell.scores),
                        "kl": cell.kl,
                    }
                    for column, cell in zip(columns, row.cells, strict=True)
                },
            }
            for row in comparison.rows
        ],
    }
    return json.dumps(json.loads(to_json_line(data)), indent=1) + "\n"


def as_html(comparison: Comparison, rows: int) -> str:
    """The page: tables, then images side by side, a row per prompt and seed."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("gardo") / "templates" / "evaluation.html.j2"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = comparison.rows[:rows]
    sections: dict[str, list[Line]] = {}
    for line in lines(comparison):
        sections.setdefault(line.section, []).append(line)
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        names=[column.contender.name for column in comparison.columns],
        sections=sections,
        explanations=explanations(comparison),
        notes=comparison.notes,
        facts=facts(comparison),
        total=len(comparison.rows),
        rows=[
            {
                "prompt": row.prompt,
                "seed": row.seed,
                "cells": [_picture(comparison, cell) for cell in row.cells],
            }
            for row in shown
        ],
    )


def _picture(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    uri, width, small = thumbnail(cell.file)
    scores = [
        (name, "–" if math.isnan(value) else f"{value:.3g}", comparison.roles[name])
        for name, value in cell.scores.items()
    ]
    return {"uri": uri, "width": width, "small": small, "scores": scores}


def thumbnail(file: Path) -> tuple[str, int, bool]:
    """A cached PNG as a data URI, the width to show, and whether its pixels are enlarged."""
    from PIL import Image

    data = file.read_bytes()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        width = image.width
        if max(image.size) <= THUMBNAIL:
            text = base64.b64encode(data).decode("ascii")
            scale = max(1, 120 // width)
            return f"data:image/png;base64,{text}", width * scale, scale > 1
        smaller = image.convert("RGB")
        smaller.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    smaller.save(buffer, format="JPEG", quality=88)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{text}", smaller.width, False
