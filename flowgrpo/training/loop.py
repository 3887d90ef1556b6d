"""The loop: roll out, score, assign credit, update."""

import os
from dataclasses import replace

from flowgrpo.config import Config, find
from flowgrpo.core.advantages import zero_variance_groups
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.training.learner import Learner
from flowgrpo.training.observer import Observer, Result
from flowgrpo.training.session import Session

__all__ = ["Result", "train"]


def train(config: Config) -> Result:
    """Fine-tune a pipeline as a configuration says; go on where an earlier run stopped.

    Raises:
        ConfigError: If the configuration cannot be run; before any model is loaded.
        RewardError: If a reward is unfit to train on, or fails too often.
        CheckpointError: If the checkpoint to go on from is damaged.
    """
    config.check(int(os.environ.get("WORLD_SIZE", "1")))
    fixed_size = config.sampling.height is not None
    prompts = PromptSet.load(find(config.prompts.train), config.prompts.balance, fixed_size)
    observer = Observer.prepare(config, prompts)
    session, scorer, policy = observer.session, observer.scorer, observer.policy
    learner = Learner(policy, config, session.accelerator)
    observer.start(learner)

    iterations = range(session.iteration, config.train.iterations)
    for iteration in session.console.track(iterations, "training", total=len(iterations)):
        observer.evaluate_if_due(iteration)
        random = Random(config.run.seed).at("train", iteration)
        scorer.iteration = iteration
        everybody = prompts.groups(iteration, config.train.groups, Random(config.run.seed))

        # 1. Roll out. The judge scores each batch while the next one is sampled.
        with session.rescue(learner, iteration), session.phase("rollout"), learner.acting():
            groups = session.share(everybody)
            experience = config.algorithm.collect(policy, groups, scorer, random, iteration)
            scorer.check_rate()
            learnt = scorer.learn(session.gather_objects)

        # 2. Credit. Groups are whole on one process; only batch statistics need the others' rewards.
        experience = _shared(session, experience)
        advantages = config.algorithm.advantages(experience)

        # 3. Update.
        with session.phase("train"):
            metrics = learner.update(experience, advantages, random)

        session.log(iteration, _summary(session, experience) | learnt | metrics, scorer.seconds)
        stopping = session.should_stop()
        if stopping or session.checkpoint_due(iteration + 1):
            session.save(learner, iteration + 1)
        if stopping:
            break
    return observer.finish()


def _shared(session: Session, experience: Experience) -> Experience:
    """The experience with what advantages need to know of the other processes."""
    return replace(experience, gathered=experience.candidates.map(session.gather))


def _summary(session: Session, experience: Experience) -> dict[str, float]:
    """What an iteration's rollouts look like, over all processes."""
    c, everyone = experience.candidates, experience.all_candidates
    finite = everyone.reward[everyone.valid]
    flat = session.gather(zero_variance_groups(c.reward, c.group).float())
    return {
        "reward": float(finite.mean()),
        "reward_std": float(finite.std(correction=0)),
        **{f"score/{k}": float(v[v.isfinite()].mean()) for k, v in everyone.scores.raw.items()},
        **{f"part/{k}": float(v[v.isfinite()].mean()) for k, v in everyone.scores.parts().items()},
        "group/zero_variance": float(flat.mean()),
        "group/diversity": float(session.gather(experience.diversity).mean()),
        "group/duplicates": float(session.gather(experience.duplicates).sum()),
        "failures": float((~everyone.valid).sum()),
        "nfe_per_prompt": experience.cost.nfe,
        "decodes_per_prompt": experience.cost.decodes,
    }
