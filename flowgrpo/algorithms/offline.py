"""Training on given pictures, or on pairs of a chosen and a rejected picture, without sampling.

A picture is encoded with the pipeline's VAE and noised at a time of the sampling grid. With the loss
``supervised`` this is supervised fine-tuning, with ``dpo`` Diffusion-DPO (arXiv:2311.12908) and its form
for flow models. No reward is needed; rewards are measured in evaluations only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience, Latents
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True, kw_only=True)
class Offline(AlgorithmBase):
    """What training on pictures and on pairs have in common: encoding, times and noise.

    The pictures of an iteration are ``train.groups`` examples of ``prompts.train``, which are drawn in a
    shuffled order, again and again.
    """

    action_kind: ClassVar[ActionKind] = "noised_sample"
    needs_rewards: ClassVar[bool] = False
    assigns_credit: ClassVar[bool] = False
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """How the place on the sampling grid is drawn at which an example is noised: ``uniform``, or the
    sigmoid of a standard normal number (``logit_normal``), as flow models are pre-trained. With
    ``sampling.num_steps = 1000`` these are the times of pre-training, with the shift of the pipeline."""
    distinct_times: int = 8
    """Different times in an iteration; example ``i`` is noised at number ``i`` modulo this. A forward pass
    serves one time, so few times fill batches. 0 draws a time for each example."""
    empty_prompts: float = 0.0
    """Share of examples that are trained with an empty prompt, in [0, 1), which keeps classifier-free
    guidance intact."""

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """Pictures per example."""
        return self.num_targets

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Encode the pictures of the groups, and record a noised version of each as its action."""
        scorer.reset()  # Its counts are those of an evaluation, and nothing is scored here.
        groups = [self._group(g, random) for g in groups]
        parts = [
            self._actions(policy, list(part), random)
            for _, part in groupby(groups, key=lambda g: (g.prompt.size, g.prompt.images))
        ]
        actions = Actions.concatenate(parts)
        number = len(actions)
        return Experience(
            groups=groups,
            transition=self.transition,
            actions=actions,
            # Nothing is scored.
            candidates=Candidates(
                actions.group,
                actions.sample,
                torch.full((number,), policy.num_steps() - 1),
                torch.ones(number, dtype=torch.long),
                Scores({}, torch.zeros(number)),
            ),
            cost=Cost(0.0, 0.0, 0.0),
            diversity=torch.zeros(len(groups)),
            duplicates=torch.zeros(len(groups)),
            step_std={},
        )

    def _group(self, group: Group, random: Random) -> Group:
        """The group, with an empty prompt if its number says so."""
        drawn = torch.rand((), generator=random.generator("empty_prompt", group.index))
        if float(drawn) >= self.empty_prompts:
            return group
        return Group(group.index, replace(group.prompt, text=""))

    def _actions(self, policy: Policy, groups: Sequence[Group], random: Random) -> Actions:
        """The actions of groups whose pictures have one size."""
        size = self.num_targets
        pictures = [p for g in groups for p in g.prompt.open_targets()]
        streams = [random.at("group", g.index, i) for g in groups for i in range(size)]
        prompts = [g.prompt for g in groups for _ in range(size)]
        data = policy.pictures.encode(prompts, pictures, streams)
        x, steps = torch.empty_like(data), []
        for row, group in enumerate(groups):
            step = self._time(group.index, policy.num_steps(), random)
            # The pictures of a pair get one time and one noise.
            own = SampleNoise([random.at("shared_noise", group.index)])
            noise = own.at_step(step, data.shape[1:]).to(data.device)
            interval = policy.scheduler.interval(step, step + 1)
            rows = slice(row * size, (row + 1) * size)
            x[rows] = interval.signal * data[rows] + interval.noise * interval.noise_scale * noise
            steps += [step] * size
        number = torch.arange(len(data))
        return Actions(
            states=Latents([x, data]),
            state=number,
            next_state=len(data) + number,
            step=torch.tensor(steps),
            old_log_prob=torch.zeros(len(data)),
            group=torch.tensor([g.index for g in groups]).repeat_interleave(size),
            sample=torch.arange(size).repeat(len(groups)),
        )

    def _time(self, index: int, num_steps: int, random: Random) -> int:
        """The grid node at which an example is noised; with ``distinct_times``, one node of each of as many
        equal parts of the distribution."""
        parts = self.distinct_times or 1
        number = index % parts if self.distinct_times else index
        drawn = float(torch.rand((), generator=random.generator("time", number)))
        if self.distinct_times:
            drawn = (number + drawn) / parts
        if self.times == "logit_normal":
            # The quantile of the normal distribution; bounded, so that it is finite.
            quantile = math.sqrt(2) * float(
                torch.erfinv(
                    torch.tensor(2 * drawn - 1, dtype=torch.float64).clamp(-1 + 1e-9, 1 - 1e-9)
                )
            )
            drawn = 1 / (1 + math.exp(-quantile))
        return min(int(drawn * num_steps), num_steps - 1)

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """None: a noised picture has no density."""
        return []

    def cost(self, num_steps: int, iteration: int, random: Random) -> Cost:
        """Nothing is sampled, decoded or scored."""
        return Cost(0.0, 0.0, 0.0)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        if not 0 <= self.empty_prompts < 1:
            raise ValueError(f"algorithm.empty_prompts must be in [0, 1), got {self.empty_prompts}")
        if self.distinct_times < 0:
            raise ValueError(
                f"algorithm.distinct_times must be at least 0, got {self.distinct_times}"
            )


@dataclass(frozen=True, kw_only=True)
class Pictures(Offline):
    """Supervised fine-tuning on pictures with prompts.

    ``prompts.train`` names a file of JSON lines with ``prompt``, ``picture`` and, if wanted, ``weight``; or a
    folder of pictures. Belongs to the loss ``supervised``, in which the advantage of a picture is its weight.
    """

    num_targets: ClassVar[int] = 1
    kind: Literal["pictures"] = "pictures"

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The weight of each picture."""
        weight = {g.index: g.prompt.weight for g in experience.groups}
        return torch.tensor([weight[int(i)] for i in experience.actions.group])


@dataclass(frozen=True, kw_only=True)
class Pairs(Offline):
    """Preference pairs: a chosen and a rejected picture of one prompt.

    ``prompts.train`` names a file of JSON lines with ``prompt``, ``chosen`` and ``rejected``, or a folder of
    votes. Both pictures of a pair get one time and one noise. Belongs to the loss ``dpo``.
    """

    num_targets: ClassVar[int] = 2
    kind: Literal["pairs"] = "pairs"

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """1 for chosen pictures, -1 for rejected ones."""
        return 1.0 - 2.0 * experience.actions.sample
