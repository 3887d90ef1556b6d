"""The end of a run: last evaluation, inspection, export, report, and a summary on the console."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.config.distillation import assigns_credit
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted
from flowgrpo.data.files import sync_tree
from flowgrpo.evaluation import inspection
from flowgrpo.evaluation.report import write_report
from flowgrpo.policy.export import Exported, base_note, export
from flowgrpo.training.console import Console
from flowgrpo.training.evaluator import bench_lines
from flowgrpo.training.logs import Logs
from flowgrpo.training.run_folder import early_stop, mark_finished, mark_stopped
from flowgrpo.training.session import Session
from flowgrpo.training.setup import TrainingRun


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        folder: The run directory.
        evaluations: The held-out evaluations; the first is of the base model.
        finished: False if the run was interrupted. The same command resumes it.
        stopped_by: The signal that interrupted the run, such as ``SIGTERM``; empty if none did.
    """

    folder: Path
    evaluations: list[Mapping[str, Any]]
    finished: bool
    stopped_by: str = ""

    @property
    def metrics(self) -> list[Mapping[str, Any]]:
        """The numbers of each iteration of the run so far, for ``pandas.DataFrame(result.metrics)``.

        The rewards are ``reward``, the mean of an iteration, and ``score/NAME`` for each reward model.
        They are read from ``metrics.jsonl``, so that iterations before a resume are there, too.
        """
        return Logs(self.folder).read("metrics")


def already_finished(session: Session) -> Result:
    """Say that the run had finished before this session, and return its result."""
    more, stopped = session.config.train.iterations * 2, early_stop(session.folder)
    early = "" if stopped is None else f", stopped early after {stopped['after']}"
    session.console.say(
        f"{session.folder} has finished its {counted(session.config.train.iterations, 'iteration')}{early}: nothing to do. "
        f"Report: {session.folder / 'report.html'}. To train further: flowgrpo train {session.folder} "
        f"--resume-with train.iterations={more}"
    )
    session.close()
    return Result(session.folder, session.past_evaluations(), True)


def finish(run: TrainingRun, early: int | None = None) -> Result:
    """Evaluate, inspect and export a run that has finished, and write its report.

    Of a run that was interrupted only the report is written.

    Args:
        run: The run.
        early: The iterations trained, if early stopping ends the run. Then the best weights are
            evaluated and exported.
    """
    session, evaluator = run.session, run.evaluator
    stopped_by = session.signals.stopping
    finished = not stopped_by
    if finished:
        if early is not None:
            _stop_early(run, early)
        evaluator.evaluate(run.config.train.iterations if early is None else early, full=True)
        session.drop_phases()
        with run.learner.behaviour_policy(), run.policy.together():
            if session.shares_main:
                _inspect(run)
        # Of a model that is divided among processes, all export together.
        if session.is_main or run.policy.in_lockstep:
            exported = _export(run)
    if session.is_main:
        write_report(session.folder)
        if finished:
            mark_finished(run.config)
            _print_result(run, exported)
        else:
            file = session.folder / "config.toml"
            session.console.say(
                f"stopped and saved; the same command resumes the run, as does: flowgrpo train {file}"
            )
    run.scorer.close()
    session.close()
    return Result(session.folder, evaluator.evaluations, finished, stopped_by)


def _stop_early(run: TrainingRun, iteration: int) -> None:
    """Say and record that early stopping ends the run, and put the best weights into the policy."""
    session, settings = run.session, run.config.train.early_stopping
    checkpoint, best, value = run.evaluator.show_best()
    if session.is_main:
        mark_stopped(run.config, iteration, checkpoint, best, value)
    session.console.say(
        f"stopped early after {iteration} of {counted(run.config.train.iterations, 'iteration')}: {settings.metric} did "
        f"not improve by more than {settings.min_gain:g} in {counted(settings.patience, 'evaluation')}. The weights "
        f"after {counted(best, 'iteration')}, with {value:.4g}, are evaluated again and exported"
        + ("; they are those before training" if best == 0 else "")
    )


def _inspect(run: TrainingRun) -> None:
    """Save strips of a few training prompts for the report: their steps, candidates and advantages.

    The policy has the weights that sample.
    """
    config = run.config
    number, seed = config.evaluation.inspected_prompts, config.run.seed
    # Given pictures and teachers have no candidates whose credit could be shown.
    if not number or config.algorithm.num_targets or not assigns_credit(config.algorithm):
        return
    prompts = [group.prompt for group in run.prompts.groups(0, number, Random(seed))]
    strips = inspection.inspect(run.policy, config.algorithm, run.scorer, prompts, seed=seed)
    if run.session.is_main:
        inspection.write_fragment(strips, run.session.folder)


def _export(run: TrainingRun) -> Exported:
    """Write the evaluated weights, in the main process, in all formats that exist for them."""
    assert run.policy.trainable is not None
    folder = run.session.folder / "export"
    with run.evaluator.evaluated_weights():
        pipeline = run.policy.stock_pipeline()
        if not run.session.is_main:
            return Exported()
        exported = export(pipeline, run.policy.trainable, folder)
    sync_tree(folder)  # before the run is marked as finished
    return exported


def _print_result(run: TrainingRun, exported: Exported) -> None:
    """Print the scores before and after training, and the paths of the results with their readers."""
    console, session = run.session.console, run.session
    before, after = run.evaluator.evaluations[0], run.evaluator.evaluations[-1]
    _print_scores(console, before, after)
    for tag, table in after.get("regimes", {}).items():
        if tag in before.get("regimes", {}):  # One may be added when a run is resumed.
            _print_scores(console, before["regimes"][tag], table, f", {tag}")
    for name, value in after["metrics"].items():
        if name in before["metrics"]:  # Metrics may be added when a run is resumed.
            console.say(f"{name}: {before['metrics'][name]:.3f} before, {value:.3f} after")
    for line in bench_lines(after.get("bench", {})):
        console.say(line)
    console.say(f"report:  {session.folder / 'report.html'}")
    console.say(f"grid:    {session.grid(after['iteration'])}")
    for line in exported.lines():
        console.say(f"weights: {line}")
    assert run.policy.trainable is not None
    if note := base_note(run.config.model.source, run.policy.trainable):
        console.say(note)


def _print_scores(
    console: Console, before: Mapping[str, Any], after: Mapping[str, Any], regime: str = ""
) -> None:
    """Tables of held-out scores before and after training, over all images and by class."""
    rows = [("all", before["scores"], after["scores"])]
    rows += [(c, before["by_class"][c], after["by_class"][c]) for c in before["by_class"]]
    title = f"held out{regime}, {counted(after['images'], 'image')}, deterministic sampler"
    every = list(before["scores"])
    # A terminal is wide enough for two rewards side by side.
    for names in (every[i : i + 2] for i in range(0, len(every), 2)):
        cells = [[label, *(c for n in names for c in _change(b[n], a[n]))] for label, b, a in rows]
        heads = [h for n in names for h in (f"{n}: before", "after", "change")]
        console.table(title, ["", *heads], cells)


def _change(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"
