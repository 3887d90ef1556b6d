"""Warnings about the metrics of a run, as sentences for its report."""

from flowgrpo.core.text import counted
from flowgrpo.evaluation.bench_section import problems
from flowgrpo.evaluation.charts import number
from flowgrpo.evaluation.hacking import fallen, seen
from flowgrpo.evaluation.records import RECENT, Records

MAX_ZERO_VARIANCE = 0.5
"""Largest healthy share of groups whose samples all have the same reward."""
MAX_NOISE = 0.5
"""Largest healthy numerical noise of log-probabilities, as a share of the clip range."""
MAX_DIVERSITY_LOSS = 0.1
"""Largest healthy fall of a diversity, as a share of its first value."""


def warnings(records: Records) -> list[str]:
    """Describe each problem that the records of a run show, as plain text, the most serious first."""
    return [
        *problems(records),
        *_reward_warnings(records),
        *_update_warnings(records),
        *_diversity_warnings(records),
        *(f"{note[0].upper()}{note[1:]}." for note in records.prompt_notes if note),
    ]


def _reward_warnings(records: Records) -> list[str]:
    found: list[str] = []
    changes = [records.change(s) for s in records.scores()] if len(records.evaluations) > 1 else []
    found += fallen(changes, records.weights()).values()
    if len(records.evaluations) > 1:
        found += seen(records.evaluations[0], records.evaluations[-1]).values()
    failures = records.total("failures")
    if failures > 0:
        found.append(
            f"Failed scores: {number(failures)}. Samples without a score are dropped from their "
            "groups, so the model learns nothing from images on which a reward model fails."
        )
    flat = records.recent("group/zero_variance")
    # The gradient of a reward does not compare samples.
    compares = records.setting("loss.kind") != "reward_gradient"
    if compares and flat > MAX_ZERO_VARIANCE:
        found.append(
            f"{100 * flat:.0f} % of the groups in the last {RECENT} iterations had no variance: all "
            "samples have the same reward, so there is nothing to learn from. Prompts may be too easy "
            "or too hard, groups too small, or the reward too coarse."
        )
    return found


def _update_warnings(records: Records) -> list[str]:
    found = []
    skipped = records.total("skipped_updates")
    if skipped > 0:
        found.append(
            f"Skipped updates: {number(skipped)}, because the gradient norm spiked. A few are "
            "harmless; many mean that the learning rate is too high."
        )
    noise, clip = records.series("log_prob/noise"), records.setting("loss.clip_range")
    above = [y for _, y in noise if clip is not None and y > MAX_NOISE * clip]
    if above:
        found.append(
            f"The log-probabilities' numerical noise reached {number(max(above))}, more than half "
            f"the clip range of {number(clip)}, in {len(above)} of {counted(len(noise), 'iteration')}. "
            "Clipping then depends on rounding errors; use a higher precision or a wider clip range."
        )
    return found


def _diversity_warnings(records: Records) -> list[str]:
    found = []
    duplicates = records.total("group/duplicates")
    if duplicates > 0:
        verb = "is" if duplicates == 1 else "are"
        found.append(
            f"Duplicates: {counted(number(duplicates), 'sample')} {verb} identical to another sample of their "
            "group. Samples of one prompt should have different noise."
        )
    for change in records.diversities():
        if change.before > 0 and change.after < (1 - MAX_DIVERSITY_LOSS) * change.before:
            fall = 100 * (1 - change.after / change.before)
            found.append(
                f"{change.name} fell by {fall:.0f} %, from {change.show(change.before)} to "
                f"{change.show(change.after)}: the images of a prompt become more similar."
            )
    return found
