"""The report's section on changes of the configuration during a run, and on its early end."""

import json
from html import escape
from typing import Any

from flowgrpo.core.text import counted
from flowgrpo.evaluation.charts import number
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.records import Records


def run_history(records: Records) -> str:
    """A table of the keys that changed, each with the iterations trained before; empty without one.

    It is read from ``sessions.jsonl``; a line that a killed process left unfinished is skipped.
    """
    file = records.folder / "sessions.jsonl"
    rows = []
    for text in file.read_text("utf-8").split("\n") if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        trained = int(line.get("checkpoint") or 0)
        for key, pair in line.get("changed", {}).items():
            cells = [number(trained), key, _words(pair.get("from")), _words(pair.get("to"))]
            rows.append("".join(f"<td>{escape(c)}</td>" for c in cells))
    stopped = _early_stop(records)
    if not rows:
        return section("End of the run", "", stopped)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    head = "<tr><th>after iterations</th><th>key</th><th>before</th><th>after</th></tr>"
    note = (
        "Keys that changed when the run was resumed. The folder <code>history</code> has each earlier "
        "configuration as a whole."
    )
    table = f'<div class="card scroll"><table>{head}{body}</table></div>'
    return section("Changes during the run", note, table + stopped)


def _early_stop(records: Records) -> str:
    """What ended the run before its last iteration, and which weights are exported; empty if nothing did."""
    try:
        found = json.loads((records.folder / "early_stop.json").read_text("utf-8"))
        metric, patience = found["settings"]["metric"], found["settings"]["patience"]
        text = (
            f"Early stopping ended the run after {counted(number(found['after']), 'iteration')}: {metric} had not improved "
            f"in {counted(patience, 'evaluation')}. The last evaluation and the export are of the weights after "
            f"{counted(number(found['best']), 'iteration')}, whose {metric} was {number(found['value'])}."
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f'<p class="card">{escape(text)}</p>'


def _words(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
