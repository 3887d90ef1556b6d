"""Results of a benchmark: ``bench.json``, ``points.json``, tables for the terminal, comparisons.

``bench.json`` holds the numbers and everything needed to repeat them; ``points.json`` holds the
points per prompt, from which intervals of differences are made without the benchmark's data.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo.bench.base import BenchError, Benchmark, Metric, Reference
from flowgrpo.bench.comparison import Row
from flowgrpo.bench.files import read_json, sha256, write_json
from flowgrpo.bench.generation import SETTINGS
from flowgrpo.bench.models import versions
from flowgrpo.bench.scoring import Scores
from flowgrpo.bench.statistics import RESAMPLES, Estimate, Table, compare, estimate
from flowgrpo.core.secrets import redact_command
from flowgrpo.core.text import counted

FILE, POINTS = "bench.json", "points.json"
FORMAT = 1
CALL_NAMES = {"num_steps": "num_inference_steps"}
"""Names in references' settings -> arguments of the pipeline's call."""


def write_results(
    out: Path, benchmark: Benchmark, scores: Scores, label: str, num_prompts: int
) -> dict[str, Any]:
    """Write ``bench.json``, ``points.json`` and the official files.

    Args:
        out: The benchmark folder.
        benchmark: The benchmark.
        scores: The judgements.
        label: Names the model.
        num_prompts: Prompts of the whole benchmark; ``scores`` may be about a part.

    Returns:
        The content of ``bench.json``.

    Raises:
        BenchError: If nothing was judged.
    """
    if not scores.judged:
        reason = next(iter(scores.failed.values()), "there are no images")
        raise BenchError(f"no image was judged: {reason}")
    metrics = benchmark.metrics()
    table = official_table(benchmark, scores)
    official = benchmark.official(out / "official", label, scores.results(_samples(scores)))
    generation = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
    call = (generation or {}).get("settings", {}).get("call", {})
    title = f"{benchmark.title} ({scores.title})"
    result: dict[str, Any] = {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "title": title,
        "task": benchmark.task,
        "label": label,
        "counts": counts_of(benchmark, scores, num_prompts),
        "metrics": _metrics(benchmark, scores, table, metrics),
        "interval": f"95 % percentile bootstrap over prompts, {RESAMPLES} resamples, seed 0",
        "judge": {
            "title": scores.title,
            "identity": dict(scores.identity),
            "version": scores.version,
            "notes": list(scores.notes),
        },
        "data": asdict(benchmark.data()),
        "generation": generation,
        "references": [_reference(r, call) for r in benchmark.references()],
        "official_files": {p.name: sha256(p) for p in official},
        "versions": versions(),
        "command": redact_command(["flowgrpo", *sys.argv[1:]]),
    }
    result["warnings"] = warnings_of(result)
    result["model_index"] = model_index(result)
    write_json(out / POINTS, _points_json(table, metrics))
    write_json(out / FILE, result)
    return result


def _samples(scores: Scores) -> int:
    numbers = [s for _, s in scores.files] + [s for _, s in scores.missing]
    judged = [s for samples in scores.judgements.values() for s in samples]
    return 1 + max([*numbers, *judged], default=0)


def official_table(benchmark: Benchmark, scores: Scores) -> Table:
    """The points of judged images alone."""
    judged = scores.by_entry()
    entries = [e for e in scores.entries if judged.get(e.key)]
    return Table.of(entries, [benchmark.points(e, judged[e.key]) for e in entries])


def strict_table(benchmark: Benchmark, scores: Scores) -> Table:
    """The same with images that are missing or failed counted as wrong on every dimension."""
    absent: dict[str, int] = {}
    for entry, _ in scores.missing:
        absent[entry.key] = absent.get(entry.key, 0) + 1
    for key, _ in scores.failed:
        absent[key] = absent.get(key, 0) + 1
    judged = scores.by_entry()
    points = [
        [
            *benchmark.points(entry, judged.get(entry.key, [])),
            *((d, 0.0) for d in entry.dimensions for _ in range(absent.get(entry.key, 0))),
        ]
        for entry in scores.entries
    ]
    return Table.of(scores.entries, points)


def counts_of(benchmark: Benchmark, scores: Scores, num_prompts: int) -> dict[str, int]:
    """How many prompts and images there are, and what became of them."""
    return {
        "prompts": len(scores.entries),
        "prompts_of_benchmark": num_prompts,
        "samples": benchmark.samples,
        "judged": scores.judged,
        "failed": len(scores.failed),
        "missing": len(scores.missing),
    }


def _metrics(
    benchmark: Benchmark, scores: Scores, table: Table, metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    incomplete = bool(scores.failed or scores.missing)
    strict: dict[str, float] = {}
    headlines = [m for m in metrics if m.headline]
    known = {d for e in scores.entries for d in e.dimensions}
    if incomplete and all(set(part) & known for m in headlines for part in m.parts):
        all_points = strict_table(benchmark, scores)
        values = all_points.values(headlines, np.ones((1, len(all_points.keys))))[0]
        strict = {m.name: float(v) for m, v in zip(headlines, values, strict=True)}
    return [
        {
            **_scaled(e),
            **(
                {"strict": _number(strict[e.metric.name], e.metric)}
                if e.metric.name in strict
                else {}
            ),
        }
        for e in estimate(table, metrics)
        if e.points
    ]


def _scaled(found: Estimate) -> dict[str, Any]:
    metric = found.metric
    return {
        "name": metric.name,
        "value": _number(found.value, metric),
        "low": _number(found.low, metric),
        "high": _number(found.high, metric),
        "points": found.points,
        "headline": metric.headline,
        "percent": metric.percent,
        "radar": metric.radar,
    }


def _number(value: float, metric: Metric) -> float | None:
    """The value in the units of the table; None for NaN, which JSON cannot represent."""
    return None if not math.isfinite(value) else round(value * (100 if metric.percent else 1), 6)


def _reference(reference: Reference, call: Mapping[str, Any]) -> dict[str, Any]:
    """A published result, with the settings that differ from those of this run."""
    differing = {
        name: [value, call[CALL_NAMES.get(name, name)]]
        for name, value in reference.settings.items()
        if CALL_NAMES.get(name, name) in call and call[CALL_NAMES.get(name, name)] != value
    }
    return {**asdict(reference), "differs": differing}


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """Reasons why the numbers may not be comparable with others."""
    counts, found = result["counts"], [*result["data"]["notes"], *result["judge"]["notes"]]
    if counts["prompts"] < counts["prompts_of_benchmark"]:
        found.append(
            f"only {counts['prompts']} of {counted(counts['prompts_of_benchmark'], 'prompt')}: this is a part of the "
            "benchmark, not its score"
        )
    if counts["missing"]:
        verbs = ("is", "counts") if counts["missing"] == 1 else ("are", "count")
        found.append(
            f"{counted(counts['missing'], 'image')} {verbs[0]} missing and {verbs[1]} for nothing; the strict score "
            "counts missing images as wrong"
        )
    if counts["failed"]:
        verb = "counts" if counts["failed"] == 1 else "count"
        found.append(
            f"{counted(counts['failed'], 'image')} could not be judged and {verb} for nothing; strict counts such "
            "images as wrong. Run the same command again to judge what is left"
        )
    judges = {r["judge"] for r in result["references"]} - {result["judge"]["title"]}
    if judges:
        found.append(
            f"published scores are by {', '.join(sorted(judges))}, these by {result['judge']['title']}"
        )
    differing = [r["model"] for r in result["references"] if r["differs"]]
    if differing:
        found.append(f"measured with other sampler settings: {', '.join(differing)}")
    if any(not r["settings"] for r in result["references"]):
        found.append(
            "the sampler settings of some published scores are not known; steps, guidance and size alone move scores"
        )
    sampler = (result["generation"] or {}).get("sampler", {})
    if sampler.get("sampler") != sampler.get("shipped_sampler"):
        found.append(
            f"sampled with {sampler['sampler']}, as in training; the pipeline ships with "
            f"{sampler['shipped_sampler']}"
        )
    if result["generation"] is None:
        found.append("the images were made elsewhere: their model and settings are not known")
    return found


def model_index(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline results as ``model-index`` metadata of a model card on the hub."""
    metrics = [
        {
            "type": m["name"],
            "value": m["value"],
            "name": f"{m['name']}, {result['title']}",
            "args": {"interval": [m["low"], m["high"]]},
        }
        for m in result["metrics"]
        if m["headline"] and m["value"] is not None
    ]
    counts, title = result["counts"], result["title"]
    if counts["prompts"] < counts["prompts_of_benchmark"]:
        title = (
            f"{title}, {counts['prompts']} of {counted(counts['prompts_of_benchmark'], 'prompt')}"
        )
    dataset = {"name": title, "type": result["benchmark"]}
    found = {"task": {"type": result["task"]}, "dataset": dataset, "metrics": metrics}
    return [{"name": result["label"], "results": [found]}]


def _points_json(table: Table, metrics: Sequence[Metric]) -> dict[str, Any]:
    return {
        "metrics": [asdict(m) for m in metrics],
        "keys": table.keys,
        "strata": table.strata,
        "dimensions": table.dimensions,
        "sums": table.sums.tolist(),
        "counts": table.counts.tolist(),
    }


def read_result(folder: Path) -> dict[str, Any]:
    """The content of ``bench.json``.

    Raises:
        BenchError: If the folder has none.
    """
    if not (folder / FILE).is_file():
        raise BenchError(f"{folder} has no {FILE}: run 'flowgrpo bench score {folder}' first")
    return read_json(folder / FILE)


def read_points(folder: Path) -> tuple[Table, list[Metric]]:
    """The points per prompt, and the metrics made of them."""
    table = read_json(folder / POINTS)
    metrics = [
        Metric(
            **{
                **m,
                "parts": tuple(tuple(p) for p in m["parts"]),
                "weights": tuple(m.get("weights", ())),
            }
        )
        for m in table["metrics"]
    ]
    shape = (len(table["keys"]), len(table["dimensions"]))
    sums, counts = (np.asarray(table[k], float).reshape(shape) for k in ("sums", "counts"))
    keys, strata, dimensions = (tuple(table[k]) for k in ("keys", "strata", "dimensions"))
    return Table(keys, strata, dimensions, sums, counts), metrics


def differences(first: Path, second: Path) -> list[Estimate]:
    """The metrics of the second folder minus those of the first, over the prompts that both have.

    Raises:
        BenchError: If they are of different benchmarks, data or judges.
    """
    one, other = read_result(first), read_result(second)
    for name, a, b in (
        ("benchmark", one["title"], other["title"]),
        ("data", one["data"]["sha256"], other["data"]["sha256"]),
        ("judge", one["judge"]["identity"], other["judge"]["identity"]),
        ("judge's version", *versions_of(one, other)),
    ):
        if a != b:
            raise BenchError(
                f"{first} and {second} differ in {name} ({a} and {b}), so their scores cannot be compared"
            )
    (a_table, metrics), (b_table, _) = read_points(first), read_points(second)
    if not set(a_table.keys) & set(b_table.keys):
        raise BenchError(f"{first} and {second} have no prompt in common")
    return [e for e in compare(a_table, b_table, metrics) if e.points]


def versions_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str]:
    """The versions of both judges; equal if one of them is unknown."""
    a, b = one["judge"]["version"], other["judge"]["version"]
    return (a, b) if a and b else ("", "")


def show(value: float | None, percent: bool) -> str:
    """A number of the table."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.2f}" if percent else f"{value:.4g}"


def interval(row: Mapping[str, Any]) -> str:
    """A metric's interval."""
    if row["low"] is None:
        return "–"
    return f"{show(row['low'], row['percent'])} to {show(row['high'], row['percent'])}"


def settings_line(result: Mapping[str, Any]) -> str:
    """The sampler's settings in one line."""
    generation = result["generation"]
    if generation is None:
        return "settings unknown (images made elsewhere)"
    settings, sampler = generation["settings"], generation.get("sampler", {})
    call = {**sampler.get("call_defaults", {}), **settings["call"]}
    parts = [f"{k} {json.dumps(v, ensure_ascii=False)}" for k, v in call.items()]
    adapters = [f"{a['adapter']} x {a['scale']:g}" for a in settings["adapters"]]
    known = [
        sampler.get("sampler", ""),
        *parts,
        settings["dtype"],
        f"seed {settings['seed']}",
        *adapters,
    ]
    return ", ".join(filter(None, known))


def compared(first: Path, second: Path) -> list[dict[str, Any]]:
    """Rows of a comparison: both values, the difference, its interval, and what it means."""
    rows = [
        {m["name"]: m["value"] for m in read_result(folder)["metrics"]}
        for folder in (first, second)
    ]
    found = []
    for estimated in differences(first, second):
        metric = estimated.metric
        verdict = "noise" if estimated.is_noise else "higher" if estimated.value > 0 else "lower"
        if not math.isfinite(estimated.low):
            verdict = "unknown"  # Too few prompts for an interval.
        found.append(
            {
                **_scaled(estimated),
                "first": rows[0].get(metric.name),
                "second": rows[1].get(metric.name),
                "verdict": verdict,
            }
        )
    return found


def comparison_rows(first: Path, second: Path) -> list[Row]:
    """The same as rows of :mod:`flowgrpo.bench.comparison`, in shares where the table has percent."""
    found = []
    for row in compared(first, second):
        factor = 100.0 if row["percent"] else 1.0
        names = ("first", "second", "value", "low", "high")
        first_mean, second_mean, value, low, high = (
            math.nan if row[n] is None else row[n] / factor for n in names
        )
        found.append(
            Row(row["name"], "", first_mean, second_mean, value, low, high, None, row["percent"])
        )
    return found
