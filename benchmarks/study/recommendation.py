"""Which method for which purpose, as far as the intervals say."""

from collections.abc import Mapping, Sequence

from benchmarks.study.plan import Kind, Plan
from benchmarks.study.results import COLOR, Runs
from benchmarks.study.statistics import Gains, comparable, compared_means, half_width, leaders
from scripts.page_tables import markdown_table

NOTE = (
    "A method is behind if its mean differs from that of the best by more than chance, for all pairs of methods at "
    "once. Of the methods that are not, take the one that suits for other reasons; the order says nothing. A method "
    "that destroyed the model in one of its runs (10 points below the model before training) is behind, and its runs "
    "enter no interval."
)


def recommendation(
    runs: Mapping[Kind, Runs], plan: Plan, title: str = "Which method for which purpose"
) -> str:
    """A row per purpose: what to take, what is behind it, and what cannot be told apart.

    With fewer than two common seeds nothing can be told apart, and the table says so.
    """
    main = runs["main"]
    if not main.by_method:
        return ""
    lost = {kind: some.collapsed() for kind, some in runs.items()}
    runs = {kind: some.steady() for kind, some in runs.items()}
    main = runs["main"]
    if not main.by_method:
        return f"### {title}\n\nEvery method destroyed the model in one of its runs."
    images, evaluations = main.least_spent("images"), main.least_spent("evaluations")
    purposes: list[tuple[str, Kind, Gains]] = [
        (f"accuracy in {plan.seconds:g} processor seconds", "main", main.gains("plain", "strict")),
        (
            f"accuracy in {plan.budget('long'):g} processor seconds",
            "long",
            runs["long"].gains("plain", "strict"),
        ),
        ("the same weights, sampled with guidance", "main", main.gains("guided", "strict")),
        (
            "trained with guidance and sampled with it",
            "guided",
            runs["guided"].gains("guided", "strict"),
        ),
        ("an expensive reward: equal images", "main", main.gains_at("images", images)),
        (
            "an expensive model: equal evaluations",
            "main",
            main.gains_at("evaluations", evaluations),
        ),
        ("variety of colours (entropy)", "main", main.gains("plain", COLOR)),
        ("prompts of new kinds", "main", main.gains("new_kinds", "strict")),
        (
            "another world, with the settings of this one",
            "second",
            runs["second"].gains("plain", "strict"),
        ),
        ("a flawed reward: the true score", "flawed", runs["flawed"].gains("plain", "graded")),
        (
            "a flawed reward: little ink",
            "flawed",
            _negative(runs["flawed"].gains("plain", "ink")),
        ),
    ]
    rows = [_row(words, gains, lost[kind]) for words, kind, gains in purposes if gains]
    heads = ["purpose", "seeds", "take one of", "its mean gain, points", "behind"]
    table = markdown_table(heads, rows)
    return f"### {title}\n\n{table}\n\n{NOTE}{_missing(main)}"


def _negative(gains: Gains) -> Gains:
    return {m: {s: -v for s, v in each.items()} for m, each in gains.items()}


def _row(words: str, gains: Gains, lost: Sequence[str]) -> list[str]:
    near, means, seeds = leaders(gains), compared_means(gains), len(comparable(gains)[1])
    if not near:
        return [words, str(seeds), "unknown: too few common seeds", "", ""]
    half = half_width(gains, seeds)
    destroyed = [f"{m} (destroys the model)" for m in lost]
    behind = [*(m for m in means if m not in near), *destroyed]
    if len(near) == len(means):
        spread = f"{100 * min(means.values()):+.1f} to {100 * max(means.values()):+.1f}"
        return [words, str(seeds), "any: none can be told from the others", f"{spread}, each ± {100 * half:.1f}", ", ".join(behind) or "none"]  # fmt: skip
    best = means[near[0]]
    gained = f"{100 * best:+.1f} ± {100 * half:.1f} ({near[0]})"
    return [words, str(seeds), ", ".join(near), gained, ", ".join(behind)]


def _missing(main: Runs) -> str:
    compared = comparable(main.gains("plain", "strict"))[0]
    waiting = [m for m in main.by_method if m not in compared]
    return f" Not compared yet, for lack of seeds: {', '.join(waiting)}." if waiting else ""
