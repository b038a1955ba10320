"""``python benchmarks/report.py results.json``: the table of a benchmark run, as Markdown.

Make ``results.json`` with ``pytest benchmarks/ --benchmark-only --benchmark-json results.json``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

_COLUMNS = "| op, size | form | time | speed-up | least MiB | GB/s | of copy | peak MiB |"


def table(results: dict[str, Any]) -> str:
    """One row per benchmark; the speed-up is against the published form of the same group."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in results["benchmarks"]:
        groups[entry["group"]].append(entry)
    lines = [_COLUMNS, "|" + "---|" * 8]
    for name, entries in groups.items():
        times = {e["extra_info"]["variant"]: e["stats"]["median"] for e in entries}
        base = times.get("eager", times.get("host numpy", times.get("reference")))
        for entry in entries:
            info = entry["extra_info"]
            seconds = entry["stats"]["median"]
            speed_up = f"{base / seconds:.1f}x" if base else ""
            lines.append(
                f"| {name} | {info['variant']} | {seconds * 1e3:.3f} ms | {speed_up} "
                f"| {info['least_mib']:.1f} | {info['gb_per_s']:.2f} "
                f"| {info['copy_fraction']:.0%} | {info['peak_mib']:.1f} |"
            )
    first = results["benchmarks"][0]["extra_info"]
    cpu = results["machine_info"]["cpu"]
    lines += [
        "",
        f"{cpu.get('brand_raw', 'unknown CPU')} ({cpu.get('count')} cores), {first['threads']} "
        f"CPU threads, device {first['device']}, copy {first['copy_gb_per_s']:.1f} GB/s.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table of a results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    print(table(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
