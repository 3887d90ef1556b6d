"""The training loop: sample and score, assign credit, update."""

from dataclasses import replace

from flowgrpo.config import Config
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.training.ending import Result, finish
from flowgrpo.training.metrics import rollout_metrics
from flowgrpo.training.session import Session
from flowgrpo.training.setup import build

__all__ = ["Result", "train"]


def train(config: Config) -> Result:
    """Fine-tune a pipeline with a configuration. Resumes a run that was interrupted.

    Raises:
        ConfigError: If the configuration cannot be run; before the model is loaded, where possible.
        RewardError: If a reward cannot be trained on, or fails too often.
        CheckpointError: If the checkpoint to resume from is damaged.
    """
    run = build(config)
    session, scorer, learner, seed = run.session, run.scorer, run.learner, Random(config.run.seed)
    iterations = range(session.iteration, config.train.iterations)
    for iteration in session.console.track(iterations, "training", total=len(iterations)):
        run.evaluator.evaluate_if_due(iteration)
        random = seed.at("train", iteration)
        groups = session.share(run.prompts.groups(iteration, config.train.groups, seed))

        # 1. Sample candidates. The scorer scores each batch while the next one is sampled.
        scorer.iteration = iteration
        with (
            session.rescue(learner, iteration),
            session.phase("rollout"),
            learner.behaviour_policy(),
        ):
            experience = config.algorithm.collect(run.policy, groups, scorer, random, iteration)
            scorer.check_rate()
            reward_metrics = scorer.learn(session.gather_objects)

        # 2. Assign credit. Each group is on one process; statistics over the batch need all rewards.
        experience = _with_everyone(session, experience)
        advantages = config.algorithm.advantages(experience)

        # 3. Update the weights.
        with session.phase("train"):
            update_metrics = learner.update(experience, advantages, random)

        metrics = rollout_metrics(experience, session.gather)
        session.log(iteration, metrics | reward_metrics | update_metrics, scorer.seconds)
        stopping = session.should_stop()
        if stopping or session.checkpoint_due(iteration + 1):
            session.save(learner, iteration + 1)
        if stopping:
            break
    return finish(run)


def _with_everyone(session: Session, experience: Experience) -> Experience:
    """The experience with the candidates of all processes, whose rewards advantages may need."""
    return replace(experience, gathered=experience.candidates.map(session.gather))
