"""The report's section on the held-out images of highest and of lowest reward."""

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from flowgrpo.core.text import counted
from flowgrpo.evaluation.charts import number
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.records import Records
from flowgrpo.evaluation.samples import FOLDER, Sample, load_samples
from flowgrpo.evaluation.tiles import data_uri


def best_and_worst(records: Records) -> str:
    """The samples of the newest evaluation that kept any; empty if there are none."""
    files = sorted(p for p in (records.folder / FOLDER).glob("*.png") if p.stem.isdecimal())
    if not files:
        return ""
    cards = []
    samples = _load(str(files[-1]), files[-1].stat().st_mtime_ns)
    for group, title in (("highest", "Highest reward"), ("lowest", "Lowest reward")):
        figures = "".join(_figure(s, source) for s, source in samples if s.group == group)
        if figures:
            cards.append(
                f'<div class="card"><h3>{title}</h3><div class="samples">{figures}</div></div>'
            )
    if not cards:
        return ""  # a run without rewards has no order of samples
    note = (
        f"Of the held-out evaluation after {counted(number(int(files[-1].stem)), 'iteration')}. Look for a way in "
        "which images with a high reward are alike, and for good images with a low one: both are faults "
        "of the reward. Of equal rewards the first are shown."
    )
    return section("Best and worst samples", note, f'<div class="pair">{"".join(cards)}</div>')


def _figure(sample: Sample, source: str) -> str:
    scores = ", ".join(f"{k} {number(v)}" for k, v in sample.scores.items())
    text = f"{sample.prompt}: {scores}"
    return (
        f'<figure><img alt="{escape(sample.prompt)}" title="{escape(text)}" src="{source}">'
        f"<figcaption><b>{number(sample.reward)}</b> {escape(sample.prompt)}"
        f"<span>{escape(scores)}</span></figcaption></figure>"
    )


@lru_cache(maxsize=8)
def _load(path: str, stamp: int) -> Sequence[tuple[Sample, str]]:
    """The samples of a file with their images as ``data:`` addresses; read again if ``stamp`` changes."""
    return [(s, data_uri(s.picture)) for s in load_samples(Path(path))]
