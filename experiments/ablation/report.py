"""The ablation as one HTML page: figures, table, and what every method draws."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.ablation.methods import METHODS
from experiments.ablation.plots import middle
from experiments.ablation.results import TITLES
from gardo.run.images import read_index
from gardo.run.metrics import write_atomic

Record = dict[str, Any]

_WIDEST = 900  # pixels of a grid on the page


def write_report(out: Path, records: Sequence[Record], summary: dict[str, Any]) -> Path:
    """Write ``report.html`` into ``out``, with the figures that are there; returns its path."""
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("report.html.j2")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source.read_text(encoding="utf-8")).render(
        summary=summary,
        titles=TITLES,
        methods={m.name: m.title for m in METHODS},
        figures=[
            (title, _png(out / name))
            for title, name in (
                ("Frontier", "frontier.png"),
                ("Curves, at the middle KL coefficient", "curves.png"),
            )
        ],
        grids=_grids(out, records),
    )
    return write_atomic(out / "report.html", page.encode("utf-8"))


def _grids(out: Path, records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the base and each method drew last, for the first seed and the middle coefficient."""
    seed, coef = min(r["seed"] for r in records), middle(records)
    shown = [r for r in records if r["seed"] == seed and r["kl_coef"] in (None, coef)]
    pictures = []
    for index, record in enumerate(shown):
        images = out / "runs" / record["folder"] / "images"
        entries = read_index(images / "index.json")
        if index == 0:
            pictures.append(("before training", _jpeg(images / entries[0]["file"])))
        pictures.append((record["setting"], _jpeg(images / entries[-1]["file"])))
    return pictures


def _jpeg(path: Path) -> str:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as file:
        image = file.convert("RGB")
    image.thumbnail((_WIDEST, 2 * _WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _png(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
