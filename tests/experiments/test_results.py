"""The page of claims: its rule, its errors, and that the committed one is up to date."""

from pathlib import Path

import pytest

from experiments.claims import CLAIMS, HOLDS, NOT, by_seeds, middle
from experiments.results import main, page
from gardo.types import UserError

DOCS = Path(__file__).parents[2] / "docs"


def test_rule():
    assert by_seeds([True, True, True]) == HOLDS
    assert by_seeds([False, False]) == NOT
    assert by_seeds([True, False, True]) == "undecided (2 of 3 seeds)"


def test_middle_coefficient():
    rows = {f"m-{c}": {"method": "m"} for c in (1, 2, 3)} | {"n": {"method": "n"}}
    assert middle({"settings": rows}, "m") == "m-2"
    assert middle({"settings": rows}, "n") == "n"


def test_names_are_unique():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def test_committed_page_follows_from_the_committed_results():
    assert page(DOCS / "experiments") == (DOCS / "results.md").read_text(encoding="utf-8")


def test_missing_results_are_named(tmp_path):
    with pytest.raises(UserError, match="results.json: cannot be read"):
        main(["--dir", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()


def test_discussion_of_an_unknown_claim_is_refused(tmp_path):
    for name in ("mixture", "ablation", "counting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    (tmp_path / "discussion.md").write_text("# Why\n\n## no-such-claim\n\nText.\n")
    with pytest.raises(UserError, match="no claim is called no-such-claim"):
        page(tmp_path)
