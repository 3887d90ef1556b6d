"""Which method for which purpose, as far as the intervals say."""

import math
from collections.abc import Mapping
from statistics import mean

from benchmarks.study.plan import Kind, Plan
from benchmarks.study.results import COLOR, Runs
from benchmarks.study.statistics import Gains, common_seeds, half_width, leaders
from scripts.page_tables import markdown_table


def recommendation(runs: Mapping[Kind, Runs], plan: Plan) -> str:
    """A row per purpose: the best method, its gain, and the methods that cannot be told from it.

    With fewer than two common seeds nothing can be told apart, and the table says so.
    """
    main = runs["main"]
    if not main.by_method:
        return ""
    images, evaluations = main.least_spent("images"), main.least_spent("evaluations")
    purposes: list[tuple[str, Gains]] = [
        (f"Accuracy in {plan.seconds:g} processor seconds", main.gains("plain", "strict")),
        (
            f"Accuracy in {plan.budget('long'):g} processor seconds",
            runs["long"].gains("plain", "strict"),
        ),
        ("The same, sampled with guidance", main.gains("guided", "strict")),
        (
            "Trained with guidance, sampled with guidance",
            runs["guided"].gains("guided", "strict"),
        ),
        ("An expensive reward: equal images", main.gains_at("images", images)),
        ("An expensive model: equal evaluations", main.gains_at("evaluations", evaluations)),
        ("Variety of colours (entropy)", main.gains("plain", COLOR)),
        ("Prompts of new kinds", main.gains("second", "strict")),
        ("A flawed reward: true score", runs["flawed"].gains("plain", "graded")),
        ("A flawed reward: least ink", _negative(runs["flawed"].gains("plain", "ink"))),
    ]
    rows = [_row(words, gains) for words, gains in purposes if gains]
    heads = ["purpose", "seeds", "best", "gain, points", "not told apart from it", "behind it"]
    return f"### Which method for which purpose\n\n{markdown_table(heads, rows)}"


def _negative(gains: Gains) -> Gains:
    return {m: {s: -v for s, v in each.items()} for m, each in gains.items()}


def _row(words: str, gains: Gains) -> list[str]:
    common, near = common_seeds(gains), leaders(gains)
    means = {m: mean(each[s] for s in common) for m, each in gains.items()} if common else {}
    if not near:
        return [words, str(len(common)), "unknown: too few common seeds", "", "", ""]
    best = near[0]
    half = half_width(gains, len(common))
    interval = "" if math.isnan(half) else f" ± {100 * half:.1f}"
    behind = sorted(set(gains) - set(near), key=lambda m: -means[m])
    return [
        words, str(len(common)), best, f"{100 * means[best]:+.1f}{interval}",
        ", ".join(near[1:]) or "none", ", ".join(behind) or "none",
    ]  # fmt: skip
