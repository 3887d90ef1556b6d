"""The report's section on costs: samples, denoiser evaluations, decodes and device time."""

import math
from html import escape

from flowgrpo.core.text import counted
from flowgrpo.evaluation.charts import Number, duration, number
from flowgrpo.evaluation.curves import evaluation_seconds, section, total
from flowgrpo.evaluation.records import Records


def costs(records: Records) -> str:
    """What the run has cost so far; empty before its first iteration."""
    if not records.metrics:
        return ""
    groups, size = (
        records.setting(k) or math.nan for k in ("train.groups", "algorithm.group_size")
    )
    iterations = len(records.metrics)
    rows = [
        _row("samples", iterations * groups * size, iterations),
        _row("denoiser evaluations in rollouts", records.total("nfe_per_prompt") * groups, iterations),
        _row("decoded images or videos", records.total("decodes_per_prompt") * groups, iterations),
        _row("held-out images", sum(e.get("images", 0) for e in records.evaluations), None),
    ]  # fmt: skip
    devices = int(records.environment.get("processes", 1))
    seconds = sum(total(t) for t in records.timings) * devices
    held_out = sum(evaluation_seconds(records)) * devices
    name = "device-seconds" if devices == 1 else f"device-seconds of {counted(devices, 'device')}"
    rows += [_row(f"{name}, iterations", seconds, iterations)]
    rows += [_row(f"{name}, held-out evaluations", held_out, None)]
    head = "<tr><th></th><th>in all</th><th>per iteration</th></tr>"
    table = f'<div class="scroll"><table>{head}{"".join(filter(None, rows))}</table></div>'
    spent = f"{duration(seconds + held_out)} of device time. " if seconds + held_out else ""
    note = (
        f"{spent}Not counted are the time of loading, checkpoints and export and of the evaluation after "
        "training, and the denoiser's evaluations in updates and held-out evaluations. Samples are those "
        "that were trained on."
    )
    return section("Costs", note, f'<div class="card">{table}</div>')


def _row(name: str, value: Number, iterations: int | None) -> str:
    """A row of the table; empty if the value is unknown or zero."""
    if not math.isfinite(value) or not value:
        return ""
    each = "" if iterations is None else number(value / iterations)
    return f"<tr><td>{escape(name)}</td><td>{number(value)}</td><td>{each}</td></tr>"
