"""Fill `gardo/templates/report.html.j2`: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gardo.run.metrics import write_atomic
from gardo.run.report import curves, facts, tables
from gardo.run.report.load import Grid, Run, load_runs

MAX_GRIDS = 5
"""Grids embedded per run: the first, the last, and some between."""
_LARGEST_PNG = 1_500_000
_LARGEST_SIDE = 2400


@dataclass(frozen=True)
class Picture:
    """A grid as a data URI."""

    uri: str
    title: str
    epoch: int | None
    width: int
    height: int


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or the comparison of several, to the HTML file `out`.

    Works on runs that are unfinished or lack images, evaluations or single metrics; what is not
    there is shown as a dash, never estimated. The file is written atomically. Returns its path.

    Raises ReportError for a folder that is not a run or holds a file that cannot be read,
    ValueError without any folder, and OSError when `out` cannot be written.
    """
    if not run_dirs:
        raise ValueError("run_dirs: expected at least one run folder, got none")
    return write_atomic(out, render(load_runs(run_dirs)).encode("utf-8"))


def render(runs: Sequence[Run]) -> str:
    """The report of loaded runs as HTML text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    pictures = [_pictures(run) for run in runs]  # first: they may add notes
    sections = [
        (title, [(panel, Markup(panel.svg)) for panel in panels])
        for title, panels in curves.sections(runs)
    ]
    source = (resources.files("gardo") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        title=runs[0].label
        if len(runs) == 1
        else "Comparison of " + ", ".join(run.label for run in runs),
        runs=runs,
        views=[
            {
                "run": run,
                "colour": i % curves.COLOURS,
                "facts": facts.facts(run),
                "method": facts.method(run),
                "switches": facts.switches(run),
                "summary": tables.summary(run),
                "scorers": tables.scorers(run),
                "settings": [(k, facts.plain(v)) for k, v in run.evaluation_settings().items()],
                "pictures": pictures[i],
                "timings": tables.timings(run),
                "forwards": tables.forwards(run),
                "all_metrics": _all_metrics(run),
            }
            for i, run in enumerate(runs)
        ],
        sections=sections,
        comparison=tables.comparison(runs) if len(runs) > 1 else [],
        differences=tables.config_differences(runs) if len(runs) > 1 else [],
    )


def _all_metrics(run: Run) -> list[tables.Row]:
    return [tables.metric_row("", key, run.metric(key)) for key in run.metric_keys()]


def _pictures(run: Run) -> list[Picture]:
    chosen = spread(run.grids, MAX_GRIDS)
    if len(chosen) < len(run.grids):
        run.notes.append(
            f"{len(chosen)} of {len(run.grids)} image grids are shown; all are in "
            "the run's images folder."
        )
    pictures = []
    for grid in chosen:
        try:
            pictures.append(_embed(grid))
        except UnidentifiedImageError:
            run.notes.append(f"images/{grid.path.name} is not a PNG.")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            run.notes.append(f"images/{grid.path.name} cannot be read: {error}")
    return pictures


def spread(items: Sequence[Grid], limit: int) -> list[Grid]:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _embed(grid: Grid) -> Picture:
    data, kind = grid.path.read_bytes(), "png"
    with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
        image: Image.Image = file
        image.load()
        if len(data) > _LARGEST_PNG or max(image.size) > _LARGEST_SIDE:
            # A page of many photographs should still open on a phone.
            image = image.convert("RGB")
            image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
        width, height = image.size
    text = base64.b64encode(data).decode("ascii")
    return Picture(f"data:image/{kind};base64,{text}", grid.title, grid.epoch, width, height)
