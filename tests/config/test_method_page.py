"""docs/method.md says what the table of ``algorithm.compat`` and the code say."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from torch import Tensor

from gardo.config import iter_keys, load_config
from gardo.config.compat import COMPAT, TOGGLES
from gardo.config.loading import parse_value

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
HEAD = ["row", "what", "paper", "official", "gardo", "key", "code"]


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


HEADER, _, *ROWS = table("Formula, key, code")


def code(cell: str) -> str:
    found = re.match(r"`([^`]+)`", cell)
    assert found, cell
    return found[1]


def by_key() -> dict[str, list[str]]:
    return {code(row[5]): row for row in ROWS}


def test_the_table_has_every_value_of_compat():
    assert HEADER == HEAD
    assert {len(row) for row in ROWS} == {len(HEAD)}
    assert len(by_key()) == len(ROWS), "a key stands there twice"
    rows = by_key()
    assert rows.keys() >= COMPAT["gardo"].keys()
    for key in COMPAT["gardo"]:
        for compat, values in COMPAT.items():
            written = parse_value(code(rows[key][HEAD.index(compat)]))
            assert (written, type(written)) == (values[key], type(values[key])), (key, compat)


def test_other_keys_of_the_table_have_their_default_in_every_mode():
    defaults = {name: field.get_default(call_default_factory=True) for name, field in iter_keys()}
    for key in by_key().keys() - COMPAT["gardo"].keys():
        written = [parse_value(code(cell)) for cell in by_key()[key][2:5]]
        assert written == [defaults[key]] * 3, key


def test_what_is_no_key_is_marked():
    assert {key for key, row in by_key().items() if row[5].endswith("*")} == set(TOGGLES)


def test_all_formulas_have_rows():
    numbered = set(re.findall(r"^\((\d+)\)", PAGE, re.MULTILINE))
    assert {number for row in ROWS for number in row[0].split(", ")} == numbered


@pytest.mark.parametrize("name", sorted({code(row[6]) for row in ROWS}))
def test_the_code_that_is_named_is_there(name):
    assert callable(resolve_name(name))


def test_the_deviations_from_the_paper_are_those_of_the_table():
    _, _, *rows = table("Where gardo differs from the paper, and why")
    explained = [code(row[0]) for row in rows]
    different = {key for key, ours in COMPAT["gardo"].items() if COMPAT["paper"][key] != ours}
    assert len(explained) == len(set(explained))
    assert set(explained) == different
    assert all(len(row) == 2 and row[1] for row in rows)


def test_the_parts_that_are_not_in_the_paper_are_off():
    algorithm = load_config("tiny").algorithm
    gate = algorithm.gate
    assert (gate.anchor, gate.uncertainty, algorithm.cap.mode) == ("batch", "ensemble", "off")
    assert (algorithm.diversity, algorithm.reward_scale, algorithm.kl_target) == (
        True,
        "none",
        None,
    )
    assert not algorithm.reference.guard


# --- the figures on ties --------------------------------------------------------------------------


def win_rates(rewards: Tensor, strict: bool) -> Tensor:
    wins = (rewards[:, None] > rewards[None]).sum(1).double()
    if strict:
        return wins / len(rewards)
    ties = (rewards[:, None] == rewards[None]).sum(1) - 1
    return (wins + ties / 2) / (len(rewards) - 1)


def gate_of_a_binary_proxy(right: float, strict: bool) -> tuple[float, float]:
    """Share of the gated whose proxy is 0, in percent, and the mean U; over 20 draws."""
    count, found = 1152, []
    proxy = (torch.arange(count) < round(right * count)).double()
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        aux = torch.rand(2, count, generator=source, dtype=torch.float64)
        u = win_rates(proxy, strict) - sum(win_rates(y, strict) for y in aux) / 2
        gate = u > u.quantile(0.9)
        found.append((100 * float(1 - proxy[gate].mean()), float(u.mean())))
    wrong, mean = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return wrong, mean


def test_the_figures_on_ties():
    gated = {
        (right, strict): gate_of_a_binary_proxy(right, strict)
        for right in (0.1, 0.5, 0.9)
        for strict in (True, False)
    }
    shares = [gated[key][0] for key in ((0.9, True), (0.9, False), (0.1, True), (0.1, False))]
    assert shares == pytest.approx([3.1, 0.0, 1.9, 28.4], abs=0.1)
    means = [gated[right, True][1] for right in (0.1, 0.5, 0.9)]
    assert means == pytest.approx([-0.41, -0.25, -0.41], abs=0.005)
    assert all(abs(mean) < 1e-12 for (_, strict), (_, mean) in gated.items() if not strict)
    source = torch.Generator().manual_seed(0)
    proxy, aux = torch.rand(2, 1152, generator=source, dtype=torch.float64)
    assert abs(float((win_rates(proxy, True) - win_rates(aux, True)).mean())) < 1e-12
