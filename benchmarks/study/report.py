"""The study's tables, and the page with tables and plots."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.study.entries import ALGORITHMS, FURTHER, RATES
from benchmarks.study.flawed_reward import BIAS
from benchmarks.study.paper_claims import paper_claims
from benchmarks.study.plan import Kind, Plan, Store
from benchmarks.study.plots import draw
from benchmarks.study.recommendation import recommendation
from benchmarks.study.results import COLOR, Runs, read_runs
from benchmarks.study.statistics import (
    Gains,
    comparable,
    half_width,
    rank_correlation,
    smallest_difference,
)
from flowgrpo.core.text import counted
from scripts.page_tables import markdown_table, write_marked_text

PLOTS = (
    "Of the training without guidance. The first plot shows the seeds and the intervals of their means. In the "
    "others thin lines are seeds, the thick line their mean, and grey lines are the means of the other methods; "
    "each line begins at the model before training."
)


def write_report(store: Store, plan: Plan, page: Path | None) -> str:
    """The study's tables in Markdown.

    Args:
        store: The results.
        plan: The sizes.
        page: Page that gets the tables between its markers, and plots and packed results in a folder of
            its name; ``None`` writes nothing.
    """
    kinds: list[Kind] = ["main", "long", "guided", "second", "flawed"]
    runs = {kind: read_runs(store, kind) for kind in kinds}
    main = runs["main"]
    parts = [
        recommendation(runs, plan) or "No reported run has finished yet.",
        at_equal_time(main, f"Equal time: {plan.seconds:g} processor seconds"),
        at_equal_work(main),
        at_equal_time(runs["long"], f"Equal time: {plan.budget('long'):g} processor seconds"),
        at_equal_time(runs["guided"], "Trained with guidance"),
        second_world(runs["second"], main),
        flawed(runs["flawed"]),
        all_methods(store, plan),
        paper_claims(read_runs(store, "main", (*ALGORITHMS, *FURTHER))),
        tuning(store),
    ]
    text = "\n\n".join(p for p in parts if p)
    if page is not None:
        plots = draw(main, page.parent / page.stem) if main.by_method else {}
        links = [f"![{words}]({page.stem}/{file.name})" for file, words in plots.items()]
        if links:
            text += "\n\n### Plots\n\n" + "\n\n".join([PLOTS, *links])
        write_marked_text(page, "study", text)
        packed = page.parent / page.stem / "results.jsonl"
        packed.parent.mkdir(parents=True, exist_ok=True)
        store.pack(packed)
        print(f"wrote {', '.join(map(str, [page, packed, *plots]))}")
    return text


def all_methods(store: Store, plan: Plan) -> str:
    """The tables with the further methods, over the seeds that all have.

    What only some of the further methods were trained for is not repeated.
    """
    kinds: list[Kind] = ["main", "long", "guided", "second", "flawed"]
    runs = {kind: read_runs(store, kind, (*ALGORITHMS, *FURTHER)).common() for kind in kinds}
    added = [k for k, some in runs.items() if any(e.name in some.by_method for e in FURTHER)]
    if "main" not in added:
        return ""
    main = runs["main"]
    shown = {k: some if k in added else Runs({}, {}) for k, some in runs.items()}
    parts = [
        recommendation(shown, plan, "All methods: which for which purpose"),
        at_equal_time(main, f"All methods, equal time: {plan.seconds:g} processor seconds"),
        at_equal_work(main, "All methods, equal images, equal evaluations"),
        flawed(shown["flawed"], "All methods, trained on a flawed reward"),
    ]
    return "\n\n".join(p for p in parts if p)


def points(gains: Gains, method: str, percent: bool = True) -> str:
    """The mean gain of a method with its interval, in points out of 100 or as it is."""
    values = list(gains[method].values())
    if any(math.isnan(v) for v in values):
        return "not reached"
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    half = scale * half_width(gains, len(values))
    text = f"{scale * mean(values):+.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def at_equal_time(runs: Runs, title: str) -> str:
    """What each method gained in its time; the largest gain without guidance comes first."""
    if not runs.by_method:
        return ""
    shown = [("plain", "strict"), ("guided", "strict"), ("new_kinds", "strict")]
    rows = []
    for method in _by_gain(runs):
        found, alike = runs.by_method[method].values(), runs.alike(method)
        drift = mean(r.points[-1].values["drift"] for r in found)
        colors = mean(r.gain("plain", COLOR) for r in found)
        rows.append(
            [
                _named(runs, method), str(len(found)),
                f"{mean(r.points[-1].spent['seconds'] for r in found):.0f}",
                f"{mean(r.iterations for r in found):.0f}",
                *(points(alike.gains(*names), method) for names in shown),
                f"{colors:+.2f}", f"{drift:.4f}", points(alike.gains("plain", "palette"), method),
            ]
        )  # fmt: skip
    rows.append(_differences([runs.steady().gains(*names) for names in shown], 4, 3))
    rows.append(_base(runs))
    heads = [
        "method", "seeds", "seconds", "iterations", "gain without guidance", "with guidance 3",
        "new kinds of prompts", "colour entropy", "drift", "palette",
    ]  # fmt: skip
    return f"### {title}\n\n{markdown_table(heads, rows)}"


def _by_gain(runs: Runs) -> list[str]:
    """The methods, those with the largest gain of strict accuracy first."""
    gains = runs.gains("plain", "strict")
    return sorted(gains, key=lambda m: -mean(gains[m].values()))


def _differences(gains: list[Gains], before: int, after: int) -> list[str]:
    methods, seeds = comparable(gains[0])
    numbers = f"{counted(len(methods), 'method')}, {counted(len(seeds), 'seed')}"
    words = f"smallest difference that is not chance ({numbers})"
    least = [100 * smallest_difference(g) for g in gains]
    shown = ["unknown" if math.isnan(v) else f"{v:.1f}" for v in least]
    return [words, *[""] * (before - 1), *shown, *[""] * after]


def _base(
    runs: Runs, parts: Sequence[str] = ("plain", "guided", "new_kinds"), empty: int = 3
) -> list[str]:
    """The model before training, over the seeds that any method has."""
    found: dict[int, Mapping] = {}
    for each in runs.by_method.values():
        found |= {seed: run.before for seed, run in each.items()}

    def level(part: str, name: str = "strict") -> float:
        return mean(float(b[part][name]) for b in found.values())

    levels = [f"{100 * level(part):.1f} %" for part in parts]
    end = [f"{level('plain', COLOR):.2f}", "0", f"{100 * level('plain', 'palette'):.1f} %"]
    return ["before training", str(len(found)), *[""] * (empty - 1), *levels, *end]


def _named(runs: Runs, method: str) -> str:
    lost = runs.diverged.get(method, 0)
    notes = [f"{lost} more diverged"] if lost else []
    if method in runs.collapsed():
        notes.append("destroyed the model in a run")
    return f"{method} ({'; '.join(notes)})" if notes else method


def at_equal_work(runs: Runs, title: str = "Equal images, equal evaluations") -> str:
    """Gains from equal numbers of scored images and of denoiser evaluations."""
    if not runs.by_method:
        return ""
    steady = runs.steady() if runs.steady().by_method else runs
    amounts = {axis: steady.least_spent(axis) for axis in ("images", "evaluations")}
    images, evaluations = amounts.values()
    by_images = runs.gains_at("images", images)
    rows = []
    for method in sorted(by_images, key=lambda m: -mean(by_images[m].values())):
        found, alike = runs.by_method[method].values(), runs.alike(method)
        spent = [mean(r.points[-1].spent[a] for r in found) for a in amounts]
        gains = [points(alike.gains_at(a, n), method) for a, n in amounts.items()]
        rows.append([method, str(len(found)), *(f"{s:,.0f}" for s in spent), *gains])
    rows.append(_differences([steady.gains_at(a, n) for a, n in amounts.items()], 4, 0))
    heads = [
        "method", "seeds", "images scored in all", "denoiser evaluations in all",
        f"gain in {images:,.0f} images", f"gain in {evaluations:,.0f} evaluations",
    ]  # fmt: skip
    return f"### {title}\n\n{markdown_table(heads, rows)}"


def second_world(runs: Runs, main: Runs) -> str:
    """Gains after training and on held-out prompts of the second world, with the settings of the first."""
    if not runs.by_method:
        return ""
    plain, usual = runs.gains("plain", "strict"), main.gains("plain", "strict")
    rows = []
    for method in _by_gain(runs):
        found, alike = runs.by_method[method].values(), runs.alike(method)
        colors = mean(r.gain("plain", COLOR) for r in found)
        gains = (points(alike.gains(part, "strict"), method) for part in ("plain", "guided"))
        rows.append([_named(runs, method), str(len(found)), *gains, f"{colors:+.2f}"])
    steady = runs.steady()
    rows.append(_differences([steady.gains(p, "strict") for p in ("plain", "guided")], 2, 1))
    rows.append(_base(runs, ("plain", "guided"), 1)[:5])
    both = [m for m in plain if m in main.by_method]
    rho = rank_correlation(*([mean(g[m].values()) for m in both] for g in (plain, usual)))
    note = (
        ""
        if math.isnan(rho)
        else f"\n\nRank correlation of the methods' gains without guidance with those in the first world: "
        f"{rho:+.2f} ({counted(len(both), 'method')})."
    )
    heads = ["method", "seeds", "gain without guidance", "with guidance 3", "colour entropy"]
    return f"### Trained in the second world\n\n{markdown_table(heads, rows)}{note}"


def flawed(runs: Runs, title: str = "Trained on a flawed reward") -> str:
    """Changes of a flawed reward, of its flaw and of the true scores after training on it."""
    if not runs.by_method:
        return ""
    graded = runs.gains("plain", "graded")
    rows = []
    for method in sorted(graded, key=lambda m: -mean(graded[m].values())):
        found = runs.by_method[method].values()
        colors = mean(r.gain("plain", COLOR) for r in found)
        gains = (points(g, method) for g in _flawed_gains(runs.alike(method)))
        rows.append([_named(runs, method), str(len(found)), *gains, f"{colors:+.2f}"])
    rows.append(_differences(_flawed_gains(runs.steady()), 2, 1))
    heads = ["method", "seeds", "flawed reward", "graded", "strict", "ink", "colour entropy"]
    return f"### {title}\n\n{markdown_table(heads, rows)}"


def _flawed_gains(runs: Runs) -> list[Gains]:
    """Changes of the flawed reward, of the graded and the strict score, and of the ink."""
    graded, strict, flaw = (runs.gains("plain", n) for n in ("graded", "strict", "ink"))
    # The reward that was trained on; the model before training was scored by its parts.
    reward = {m: {s: v + BIAS * flaw[m][s] for s, v in each.items()} for m, each in graded.items()}
    return [reward, graded, strict, flaw]


def tuning(store: Store) -> str:
    """The scores of all tuning runs, and what was chosen."""
    rows = []
    for entry in (*ALGORITHMS, *FURTHER):
        choice, tried = store.chosen(entry), store.tuning(entry)
        if choice is None:
            continue
        by_rate = {c.rate: s for c, s in tried.items() if c.value == entry.values[0]}
        others = sorted((c for c in tried if c.value == entry.values[1]), key=lambda c: c.rate)
        cost = store.seconds_per_iteration(entry, choice.value)
        rows.append(
            [
                entry.name, f"{entry.constant}: {entry.values[0]}, {entry.values[1]}",
                *(f"{100 * by_rate[rate]:.1f}" for rate in RATES),
                ", ".join(f"{100 * tried[c]:.1f} at {c.rate:g}" for c in others),
                f"{choice.rate:g}, {choice.value}", f"{cost:.2f}",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    heads = [
        "method", "constant", *(f"first value, rate {rate:g}" for rate in RATES),
        "second value", "chosen", "seconds per iteration",
    ]  # fmt: skip
    return f"### Tuning\n\n{markdown_table(heads, rows)}"
