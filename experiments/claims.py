"""The claims of the method and what the experiments' results say of each.

A verdict follows a rule that was fixed with the protocol: *holds* when the sign is as claimed in
every seed, *does not hold* when it is in none, else *undecided*, with the number of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Results = dict[str, Any]
Verdict = tuple[str, str]

HOLDS, NOT, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim, the experiment that tests it, and how its results are read.

    Attributes:
        name: heading of its paragraph in the discussion.
        experiment: whose ``results.json`` `judge` is called with.
        judge: returns the verdict and the figures behind it.
    """

    name: str
    text: str
    experiment: str
    judge: Callable[[Results], Verdict]


def by_seeds(as_claimed: Sequence[bool]) -> str:
    """The verdict of the rule above."""
    agreeing = sum(as_claimed)
    if agreeing == len(as_claimed):
        return HOLDS
    return NOT if agreeing == 0 else f"{UNDECIDED} ({agreeing} of {len(as_claimed)} seeds)"


def _mixture(part: str, method: str, figure: str) -> Callable[[Results], list[float]]:
    def read(results: Results) -> list[float]:
        values: list[float] = results["parts"][part]["methods"][method][figure]["seeds"]
        return values

    return read


def _listed(values: Sequence[float], digits: int = 2) -> str:
    return f"{fmean(values):.{digits}f} ({' '.join(f'{v:.{digits}f}' for v in values)})"


def _mode_found(results: Results) -> Verdict:
    without = _mixture("base", "grpo-no-std", "centre")(results)
    shaped = _mixture("base", "shaping", "centre")(results)
    figures = (
        f"share in the best mode: {_listed(shaped)} with the factor, {_listed(without)} without"
    )
    return by_seeds([b > 0.5 > a for a, b in zip(without, shaped, strict=True)]), figures


def _mode_kept(results: Results) -> Verdict:
    values = _mixture("base", "gardo", "centre")(results)
    return by_seeds([v > 0.5 for v in values]), f"share in the best mode: {_listed(values)}"


def _std_noise(results: Results) -> Verdict:
    divided = _mixture("std", "grpo", "off_last_context")(results)
    plain = _mixture("std", "grpo-no-std", "off_last_context")(results)
    figures = (
        f"off the manifold where the proxy is noise: {_listed(divided)} with the std, "
        f"{_listed(plain)} without"
    )
    return by_seeds([a > 0.5 > b for a, b in zip(divided, plain, strict=True)]), figures


def _kl_free_hacked(results: Results) -> Verdict:
    values = _mixture("hack", "grpo", "hacked")(results)
    return by_seeds([v > 0.5 for v in values]), f"hacked share: {_listed(values)}"


def _static_gate_resists(results: Results) -> Verdict:
    values = _mixture("hack", "gardo-static", "hacked")(results)
    gated = _mixture("hack", "gardo-static", "penalised")(results)
    return by_seeds([v < 0.05 for v in values]), (
        f"hacked share: {_listed(values)}; penalised {fmean(gated):.1%} of the samples"
    )


def _adaptive_resists(results: Results) -> Verdict:
    values = _mixture("hack", "gardo", "hacked")(results)
    return by_seeds([v < 0.05 for v in values]), f"hacked share: {_listed(values)}"


def _guarded_does_both(results: Results) -> Verdict:
    hacked = _mixture("hack", "gardo-guarded", "hacked")(results)
    centre = _mixture("hack", "gardo-guarded", "centre")(results)
    both = [h < 0.05 and c > 0.25 for h, c in zip(hacked, centre, strict=True)]
    return by_seeds(both), f"hacked {_listed(hacked)}; in the best mode {_listed(centre)}"


def _setting(results: Results, name: str, figure: str) -> list[float]:
    values: list[float] = results["settings"][name][figure]["seeds"]
    return values


def _start(results: Results, figure: str) -> list[float]:
    values: list[float] = results["start"][figure]["seeds"]
    return values


def middle(results: Results, method: str) -> str:
    """Name of a method's setting at the middle KL coefficient."""
    names = [n for n, row in results["settings"].items() if row["method"] == method]
    return names[len(names) // 2]


def _images_hacked(results: Results) -> Verdict:
    gain = _difference(_setting(results, "grpo", "proxy"), _start(results, "proxy"))
    loss = _difference(_setting(results, "grpo", "strict"), _start(results, "strict"))
    hacked = [g > 0 > s for g, s in zip(gain, loss, strict=True)]
    return by_seeds(hacked), f"proxy {_signed(gain)}, strict accuracy {_signed(loss)}"


def _difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _signed(values: Sequence[float]) -> str:
    return f"{fmean(values):+.3f} ({' '.join(f'{v:+.3f}' for v in values)})"


def _against(method: str, other: str, figure: str) -> Callable[[Results], Verdict]:
    """Whether a method's figure is above another's, each at its middle KL coefficient."""

    def judge(results: Results) -> Verdict:
        first, second = middle(results, method), middle(results, other)
        change = _difference(_setting(results, first, figure), _setting(results, second, figure))
        return by_seeds(
            [c > 0 for c in change]
        ), f"{figure}: {first} minus {second} {_signed(change)}"

    return judge


def _frontier(results: Results) -> Verdict:
    """GARDO against plain KL by the gain that keeps the held-out accuracy; one number each."""
    gains = {m: results["methods"][m]["kept_gain"] for m in ("gardo", "grpo-kl", "grpo")}
    shown = ", ".join(f"{m} {'none' if g is None else f'{g:+.3f}'}" for m, g in gains.items())
    ours, theirs = (gains[m] if gains[m] is not None else 0.0 for m in ("gardo", "grpo-kl"))
    return HOLDS if ours > theirs else NOT, f"gain of the proxy without loss: {shown}"


def _cost(results: Results) -> Verdict:
    """Seconds per epoch by the median over seeds, at the middle coefficient."""
    names = [middle(results, method) for method in ("gardo", "gardo-kl-on-all")]
    ours, theirs = (results["settings"][name]["seconds"]["median"] for name in names)
    figures = f"seconds per epoch: {names[0]} {ours:.2f}, {names[1]} {theirs:.2f}"
    return HOLDS if ours < theirs else NOT, figures


def _counts_further(results: Results) -> Verdict:
    methods = results["methods"]
    values = {m: methods[m]["ranges"]["unseen"]["seeds"] for m in ("base", "grpo", "gardo")}
    above = [
        ours > max(theirs, values["base"][0])
        for ours, theirs in zip(values["gardo"], values["grpo"], strict=True)
    ]
    figures = ", ".join(f"{m} {_listed(v, 3)}" for m, v in values.items())
    return by_seeds(above), f"accuracy at 8 and 9: {figures}"


CLAIMS = (
    Claim(
        "proxy-is-hacked",
        "Without regularisation the proxy is exploited (images)",
        "ablation",
        _images_hacked,
    ),
    Claim(
        "flaw-is-followed",
        "Without regularisation a reachable flaw is followed (2-D)",
        "mixture",
        _kl_free_hacked,
    ),
    Claim(
        "frontier",
        "GARDO gains more of the proxy than plain KL without losing held-out accuracy",
        "ablation",
        _frontier,
    ),
    Claim(
        "better-than-kl-free",
        "GARDO ends with a higher held-out accuracy than KL-free GRPO",
        "ablation",
        _against("gardo", "grpo", "strict"),
    ),
    Claim(
        "gate-is-enough-2d",
        "A KL on the few uncertain samples suffices (2-D, static reference)",
        "mixture",
        _static_gate_resists,
    ),
    Claim(
        "gate-is-enough",
        "Penalising the rest as well costs gain of the proxy (images)",
        "ablation",
        _against("gardo", "gardo-kl-on-all", "proxy"),
    ),
    Claim(
        "adaptive-keeps-protection",
        "The adaptive reference keeps the protection (2-D)",
        "mixture",
        _adaptive_resists,
    ),
    Claim(
        "adaptive-gains",
        "The adaptive reference gains more of the proxy than a static one (images)",
        "ablation",
        _against("gardo", "gardo-static", "proxy"),
    ),
    Claim(
        "diversity-finds-modes",
        "The diversity factor finds a rare mode (2-D)",
        "mixture",
        _mode_found,
    ),
    Claim("gardo-finds-modes", "GARDO with its KL still finds it (2-D)", "mixture", _mode_kept),
    Claim(
        "diversity",
        "The diversity factor keeps samples diverse (images)",
        "ablation",
        _against("gardo", "gardo-no-diversity", "diversity"),
    ),
    Claim(
        "std-noise",
        "Dividing by the std follows noise-sized differences (2-D)",
        "mixture",
        _std_noise,
    ),
    Claim(
        "std",
        "Not dividing by the std ends with a higher held-out accuracy (images)",
        "ablation",
        _against("gardo", "gardo-with-std", "strict"),
    ),
    Claim(
        "cost",
        "A gated KL costs less time per epoch than one on all samples",
        "ablation",
        _cost,
    ),
    Claim(
        "counts-further",
        "GARDO counts further beyond what was shown than the base and GRPO",
        "counting",
        _counts_further,
    ),
    Claim(
        "guarded",
        "Not in the paper: a guarded reset resists the flaw and finds the best mode (2-D)",
        "mixture",
        _guarded_does_both,
    ),
)
