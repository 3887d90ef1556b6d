"""The report's section on changes of the configuration during a run."""

import json
from html import escape
from typing import Any

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
    if not rows:
        return ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    head = "<tr><th>after iterations</th><th>key</th><th>before</th><th>after</th></tr>"
    note = (
        "Keys that changed when the run was resumed. The folder <code>history</code> has each earlier "
        "configuration as a whole."
    )
    table = f'<div class="card scroll"><table>{head}{body}</table></div>'
    return section("Changes during the run", note, table)


def _words(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
