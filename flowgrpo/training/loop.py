"""The training loop: sample and score, assign credit, update."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flowgrpo.config import Config
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.training.ahead import Rollouts
from flowgrpo.training.ending import Result, already_finished, finish
from flowgrpo.training.explained import explained
from flowgrpo.training.inputs import check_inputs
from flowgrpo.training.launch import num_ranks
from flowgrpo.training.logs import OnLog
from flowgrpo.training.metrics import rollout_metrics
from flowgrpo.training.replay_buffer import Replayed, with_replayed
from flowgrpo.training.run_changes import in_force
from flowgrpo.training.session import Session
from flowgrpo.training.setup import TrainingRun, build
from flowgrpo.training.signals import StopRequested

__all__ = ["Result", "train"]


def train(
    config: Config, kept: Sequence[str] = (), on_log: OnLog = lambda name, record: None
) -> Result:
    """Fine-tune a pipeline with a configuration. Resumes a run that was interrupted.

    A run that has finished is not touched. Signals are described in
    :class:`flowgrpo.training.signals.Signals`.

    Args:
        config: The configuration.
        kept: Keys that it changes in a run that exists, and that stay changed when the run is resumed
            with the configuration that started it (:func:`flowgrpo.training.run_changes.extend`).
        on_log: A function of a name and a record, for loggers of your own. It gets ``"metrics"`` with
            the numbers of an iteration after each one, and ``"evaluations"`` with the result of a
            held-out evaluation after each one (docs/metrics.md explains both), in the main process,
            once they are in the run directory. An error in it ends the run; the same call resumes it, and
            then records since the last checkpoint come again, with the same ``iteration``.

    Raises:
        TypeError: If it is the name of a configuration instead.
        ConfigError: If the configuration cannot be run; before the model is loaded, where possible.
        RewardError: If a reward cannot be trained on, or fails too often.
        DivergenceError: If training has destroyed the policy.
        CheckpointError: If all checkpoints to resume from are damaged.
        LostRankError: If another process of the run ends or does not answer.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"flowgrpo.train takes a configuration, got {config!r}; read it: flowgrpo.train(flowgrpo.load({config!r}))"
        )
    config, notes = in_force(config)
    prompts, held_out = check_inputs(config, num_ranks())
    try:
        with Session(config, kept, on_log) as session, explained(session):
            for note in notes:
                session.console.say(note)
            if session.is_finished:
                return already_finished(session)
            session.announce()
            return iterate(build(config, session, prompts, held_out))
    except StopRequested as signal:
        return Result(Path(config.run.folder), [], False, str(signal))


def iterate(run: TrainingRun) -> Result:
    """Train a run that is set up until it has finished or is stopped."""
    config, session, scorer, learner = run.config, run.session, run.scorer, run.learner
    seed = Random(config.run.seed)
    rollouts = Rollouts(run, seed)
    iterations = range(session.iteration, config.train.iterations)
    for iteration in session.console.track(iterations, "training", total=len(iterations)):
        random = seed.at("train", iteration)
        with session.rescue(learner, iteration):
            run.evaluator.evaluate_if_due(iteration, before=rollouts.settle)
            if run.evaluator.is_over:
                session.save_now(learner, iteration)
                return finish(run, iteration)

            # 1. Sample candidates. The scorer scores each batch while the next one is sampled.
            with session.phase("rollout"):
                experience, summary = rollouts.of(iteration, random)
                reward_metrics = scorer.learn(session.gather_objects)
            # Each group is on one process; statistics over the batch need all rewards.
            experience = _with_everyone(session, experience)

        update_metrics: dict[str, float] = {}
        if scorer.trains_policy(iteration):
            # 2. Assign credit.
            experience = learner.with_expected(experience, session.gather_objects)
            advantages = config.algorithm.advantages(experience)
            replayed = _with_replayed(run, experience, advantages, random, iteration)

            # 3. Update the weights.
            with session.phase("train"):
                stale = summary.metrics["staleness"] > 0
                update_metrics = learner.update(
                    replayed.experience, replayed.advantages, random, stale
                )
            update_metrics |= replayed.metrics
            del replayed

        metrics = rollout_metrics(experience, session.gather) | summary.metrics
        # Its latents would stay on the device during the next rollout.
        del experience
        session.log(iteration, metrics | reward_metrics | update_metrics, summary.scoring_seconds)
        if session.save_if_due(learner, iteration + 1):
            break
    return finish(run)


def _with_replayed(
    run: TrainingRun, experience: Experience, advantages: Tensor, random: Random, iteration: int
) -> Replayed:
    """The actions of an iteration, with those of earlier groups if the run replays any."""
    learner, session = run.learner, run.session
    if learner.buffer is None:
        return Replayed(experience, advantages, {})
    return with_replayed(
        learner.buffer,
        learner.replay,
        experience,
        advantages,
        random,
        iteration=iteration,
        num_groups=run.config.train.groups,
        rank=session.shares.index,
        num_ranks=session.shares.number,
        gather=session.gather_objects,
    )


def _with_everyone(session: Session, experience: Experience) -> Experience:
    """The experience with the candidates of all processes, whose rewards advantages may need."""
    if len(experience.candidates) == 0:  # The algorithm judges nothing, in all processes.
        return experience
    return replace(experience, gathered=experience.candidates.map(session.gather))
