"""One training run of the study: its parts, its iterations with what they cost, and its evaluations.

The run is that of :mod:`flowgrpo.training.loop`, without a run directory: many short runs share one
process, which need not import and compile anything anew, and the time of a run is the processor time of
its rollouts and updates alone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import flowgrpo
from benchmarks.study.flawed_reward import Ink
from benchmarks.study.held_out_reward import Palette
from flowgrpo.config import find
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation import held_out
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.shapes.rewards import Diversity
from flowgrpo.shapes.world import WORLD, World
from flowgrpo.training.learner import Learner


@dataclass(frozen=True)
class Spent:
    """What iterations have cost.

    Attributes:
        seconds: Processor time of rollouts and updates.
        images: Images that were scored.
        evaluations: Denoiser evaluations of rollouts.
    """

    seconds: float = 0.0
    images: float = 0.0
    evaluations: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(self._values, other._values, strict=True)))

    @property
    def _values(self) -> tuple[float, ...]:
        return self.seconds, self.images, self.evaluations


_Kept = tuple[Sequence[Prompt], SampleNoise, Sequence[tuple[int, Tensor, Tensor]]]
"""Prompts and noise of paths, and for each step its number, the states and the model's outputs."""


class Trial:
    """A policy in training, and everything that it is trained and evaluated with."""

    def __init__(self, settings: Sequence[str], seed: int, world: World = WORLD):
        """
        Args:
            settings: ``--set`` arguments on top of the quick start.
            seed: Seed of training and of evaluations.
            world: What the pictures show.
        """
        self.metrics = (Diversity(world), Ink(), Palette(world))
        config = flowgrpo.load(
            "quickstart_flow_grpo", [*settings, f"run.seed={seed}", "run.device='cpu'"]
        )
        config.check()
        self.config, self.seed, self.random = config, seed, Random(seed)
        self.algorithm = config.algorithm
        self.prompts = _prompt_set(config.prompts.train, config.prompts.balance)
        self.held_out = _prompt_set(config.prompts.held_out, config.prompts.balance)
        self.scorer = RewardScorer(config.rewards, config.failures)
        self.policy = PipelinePolicy.from_pretrained(
            config.model.path,
            sampling=config.sampling,
            weights=config.model.weights,
            batch_size=config.train.rollout_batch,
            seed=seed,
            with_reference=config.loss.needs.reference,
        )
        self.learner = Learner(
            self.policy,
            config.train,
            config.loss,
            Accelerator(cpu=True),
            with_baseline=getattr(config.algorithm, "needs_baseline", False),
        )
        self.iteration = 0
        self.rewards: list[float] = []
        self._states: _Kept | None = None

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        self.scorer.close()

    def train_once(self) -> Spent:
        """One iteration.

        Raises:
            DivergenceError: If the policy is destroyed.
        """
        began, index = time.process_time(), self.iteration
        groups = self.prompts.groups(index, self.config.train.groups, self.random)
        random = self.random.at("train", index)
        self.scorer.iteration = index
        with self.learner.behaviour_policy():
            experience = self.algorithm.collect(self.policy, groups, self.scorer, random, index)
        self.scorer.check_rate()
        experience = self.learner.with_expected(experience, list)
        advantages = self.algorithm.advantages(experience)
        self.learner.update(experience, advantages, random)
        self.iteration += 1
        seconds = time.process_time() - began
        reward = experience.candidates.reward
        self.rewards.append(float(reward[reward.isfinite()].mean()))
        images = experience.cost.rewards * len(groups)
        return Spent(seconds, images, experience.cost.nfe * len(groups))

    def reference_work(self, images: int) -> float:
        """Processor seconds of sampling a few images, which show how fast the machine is now."""
        prompts = _first(self.held_out.prompts, images)
        noise = SampleNoise([Random(0).at("speed", i) for i in range(len(prompts))])
        began = time.process_time()
        for _ in self.policy.run(prompts, noise):
            pass
        return time.process_time() - began

    def evaluate(
        self, images: int, prompts: PromptSet | None = None, guidance: float | None = None
    ) -> dict[str, Any]:
        """Scores and metrics of images of held-out prompts, drawn deterministically.

        Args:
            images: Number of images, spread over the prompts and their classes.
            prompts: Other prompts than the held-out ones.
            guidance: Guidance scale, if not that of training.
        """
        sampling = self.config.sampling
        if guidance is not None:
            sampling = replace(sampling, guidance_scale=guidance)
        chosen = prompts or self.held_out
        found = self._evaluated(chosen, images, sampling)
        by_class = {k: v["strict"] for k, v in found["by_class"].items()}
        return {
            "images": images,
            "reward": found["reward"],
            **found["scores"],
            **found["metrics"],
            "by_class": by_class,
        }

    def _evaluated(self, prompts: PromptSet, images: int, sampling: Sampling) -> Mapping[str, Any]:
        return held_out.evaluate(
            self.policy,
            self.scorer,
            held_out.plan(prompts, images),
            seed=self.seed,
            sampling=sampling,
            balance=prompts.balance,
            metrics=self.metrics,
        )

    def keep_states(self, paths: int) -> None:
        """Record states of the deterministic sampler, and the model's outputs there, before training.

        Args:
            paths: Number of paths, at most the number of samples in a batch; each has a state per step.
        """
        prompts = _first(self.held_out.prompts, paths)
        noise = SampleNoise([Random(0).at("drift", i) for i in range(paths)])
        end = self.policy.num_steps()
        states = []
        for rollout in self.policy.run(prompts, noise, record=range(end), decode=False):
            assert len(rollout.rows) == paths, "one batch"
            states = [(r.step, r.x.clone(), r.prediction.output.clone()) for r in rollout.records]
        self._states = prompts, noise, states

    def drift(self) -> float:
        """Mean squared difference of the model's outputs from those before training, on fixed states.

        The states are those of :meth:`keep_states`: the deterministic path of the model before training,
        at all steps.
        """
        assert self._states is not None, "keep_states comes first"
        prompts, noise, states = self._states
        gaps = []
        for step, x, before in states:
            run = self.policy.run(
                prompts, noise, nodes=[step, step + 1], x=x, record=[step], decode=False
            )
            (record,) = next(iter(run)).records
            gaps.append(float((record.prediction.output - before).float().square().mean()))
        return sum(gaps) / len(gaps)


def _first(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """The first prompts, from the beginning again if there are too few."""
    return [prompts[i % len(prompts)] for i in range(number)]


def _prompt_set(path: str, balance: str) -> PromptSet:
    return PromptSet.load(find(path), balance)


def load_prompts(path: Path) -> PromptSet:
    """Prompts with GenEval's metadata, balanced over their kinds."""
    return PromptSet.load(path, "tag")


def no_threads() -> None:
    """One thread of torch: processor seconds then do not depend on what else runs."""
    torch.set_num_threads(1)
