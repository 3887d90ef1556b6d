"""What every algorithm's ``collect`` shares: who is sampled, what is recorded, judged and counted."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import ODE, Gaussian, Transition
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.rewards.scorer import RewardScorer, Scores

Strides = Literal["even", "released"]

JUMP = 0
"""The granularity of a candidate that was decoded from the predicted data."""


@dataclass(frozen=True)
class Samples:
    """Rows of a batch: whose samples they are, and the noise that they get.

    Attributes:
        groups: The group of each row.
        numbers: The index of each row's sample in its group.
        noise: The random streams of each row.

    Example:
        ``samples[::6]`` are the first of every six samples: those that stand for what six share.
    """

    groups: Sequence[Group]
    numbers: Sequence[int]
    noise: SampleNoise

    @classmethod
    def of(
        cls, groups: Sequence[Group], size: int, random: Random, num_seeds: int | None = None
    ) -> "Samples":
        """``size`` samples of each group, those of a group in a row.

        Args:
            groups: The prompts.
            size: Samples per group.
            random: Keyed by the iteration.
            num_seeds: Initial noises per group, each shared by equally many samples in a row; None
                gives every sample its own.
        """
        owners = [(g, i) for g in groups for i in range(size)]
        initial = None
        if num_seeds is not None:
            initial = [
                random.at("group", g.index, *(() if num_seeds == 1 else ("seed", seed)))
                for g in groups
                for seed in range(num_seeds)
                for _ in range(size // num_seeds)
            ]
        streams = [random.at("group", g.index, i) for g, i in owners]
        return cls([g for g, _ in owners], [i for _, i in owners], SampleNoise(streams, initial))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples(self.groups[rows], self.numbers[rows], self.noise[rows])

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each row."""
        return [g.prompt for g in self.groups]

    @property
    def group(self) -> Int[Tensor, " rows"]:
        """The index of each row's group."""
        return torch.tensor([g.index for g in self.groups])

    @property
    def sample(self) -> Int[Tensor, " rows"]:
        """The index of each row's sample in its group."""
        return torch.tensor(list(self.numbers))


Watch = Callable[[Samples, Tensor], None]
"""What else wants to see samples and their media."""


@dataclass(frozen=True)
class _Submission:
    """A batch on its way through the judge."""

    samples: Samples
    step: int
    granularity: int
    scores: "Future[Scores]"
    media: Tensor | None


class Collection:
    """The experience of one iteration in the making."""

    def __init__(
        self,
        policy: PipelinePolicy,
        groups: Sequence[Group],
        scorer: RewardScorer,
        transition: Transition,
        watch: Watch | None = None,
    ):
        """Begin to count.

        Args:
            policy: What is sampled.
            groups: The prompts.
            judge: Scores the candidates; its own counts begin anew.
            transition: The stochastic step.
            watch: Sees every batch that goes to the judge.
        """
        scorer.reset()
        self._watch = watch
        self.policy, self.groups, self.scorer, self.transition = policy, groups, scorer, transition
        self._before = policy.num_evaluations, policy.num_decodes
        self._actions: list[Actions] = []
        self._submissions: list[_Submission] = []
        self._num_judged = 0
        self._thumbnails: list[tuple[Tensor, Tensor]] = []
        self._step_std: dict[int, float] = {}

    def add(self, actions: Actions) -> None:
        """Note actions that are no steps of a visit."""
        self._actions.append(actions)

    def act(self, samples: Samples, record: StepRecord) -> None:
        """Note a stochastic step that each sample took from a state of its own."""
        own = torch.arange(len(samples))
        self._note(samples, record, own, record.gaussian, record.x_next)

    def branch(self, samples: Samples, record: StepRecord) -> Float[Tensor, "samples *latent"]:
        """Take a stochastic step from each state of a visit, for several samples in a row each.

        The visit's forward pass serves all of them; whatever step followed it there is put aside.

        Returns:
            The state of each sample after its step.
        """
        gaussian = self.transition(record.x, record.prediction, record.interval)
        state = torch.arange(len(record.x)).repeat_interleave(len(samples) // len(record.x))
        spread = Gaussian(
            gaussian.mean[state.to(gaussian.mean.device)], gaussian.std, gaussian.normalised
        )
        noise = samples.noise.at_step(record.step, record.x.shape[1:])
        x_next = spread.sample(noise.to(spread.mean.device))
        self._note(samples, record, state, spread, x_next)
        return x_next

    def submit(
        self,
        samples: Samples,
        media: Float[Tensor, "samples *frames channels height width"],
        step: int,
        granularities: Sequence[int] = (1,),
        compare: bool = True,
    ) -> None:
        """Hand decoded candidates to the judge.

        Args:
            samples: Whose they are.
            media: In [0, 1].
            step: The step after which they were completed.
            granularities: Those that lead to these very candidates; they are judged once.
            compare: Whether they count in the group's diversity and duplicates.
        """
        scores = self.scorer.submit(media, samples.prompts)
        if self._watch is not None:
            self._watch(samples, media)
        self._num_judged += len(samples)
        kept = media if self.scorer.keeps_media else None
        self._submissions += [_Submission(samples, step, g, scores, kept) for g in granularities]
        if compare:
            self._thumbnails.append((samples.group, thumbnail(media)))

    def complete(
        self,
        samples: Samples,
        x: Float[Tensor, "samples *latent"],
        node: int,
        *,
        step: int,
        granularities: Sequence[int] = (1,),
        strides: Strides = "even",
        compare: bool = True,
    ) -> None:
        """Follow the ODE from states to the data, decode, and judge.

        Completions on several sub-grids begin in the same state, so they share its forward pass;
        sub-grids that are equal share all of it.

        Args:
            samples: Whose states they are.
            x: The states.
            node: The grid node that they are at; at the last one they are decoded as they are.
            step: The step that the candidates judge.
            granularities: Grid intervals per step.
            strides: See :func:`subgrids`.
            compare: As in :meth:`submit`.
        """
        end = self.policy.num_steps()
        (nodes, same), *others = subgrids(node, end, granularities, strides).items()
        for rollout in self.policy.run(
            samples.prompts, samples.noise, nodes=nodes, x=x, record=[node] if others else []
        ):
            assert rollout.media is not None
            part = samples[rollout.rows.start : rollout.rows.stop]
            self.submit(part, rollout.media, step, same, compare)
            for grid, equal in others:
                (record,) = rollout.records
                interval = self.policy.scheduler.interval(grid[0], grid[1])
                ahead = ODE()(record.x, record.prediction, interval).mean
                (rest,) = self.policy.run(part.prompts, part.noise, nodes=grid[1:], x=ahead)
                assert rest.media is not None
                self.submit(part, rest.media, step, equal, compare=False)

    def project(self, samples: Samples, record: StepRecord) -> None:
        """Decode and judge the data that the model predicts where a step was about to begin.

        The candidates judge the step before. This needs no forward pass of its own.
        """
        end, x0 = self.policy.num_steps(), record.prediction.x0
        for rollout in self.policy.run(samples.prompts, samples.noise, nodes=[end], x=x0):
            assert rollout.media is not None
            part = samples[rollout.rows.start : rollout.rows.stop]
            self.submit(part, rollout.media, record.step - 1, [JUMP], compare=False)

    def experience(self) -> Experience:
        """Wait for the judge, and put everything together."""
        done = [(s, s.scores.result()) for s in self._submissions]
        names = done[0][1].raw
        candidates = Candidates(
            group=torch.cat([s.samples.group for s, _ in done]),
            sample=torch.cat([s.samples.sample for s, _ in done]),
            step=torch.cat([torch.full((len(s.samples),), s.step) for s, _ in done]),
            granularity=torch.cat([torch.full((len(s.samples),), s.granularity) for s, _ in done]),
            scores={n: torch.cat([scores.raw[n] for _, scores in done]) for n in names},
            reward=torch.cat([scores.reward for _, scores in done]),
        )
        small = self._small_by_group()
        evaluations, decodes = self._before
        number = len(self.groups)
        return Experience(
            groups=self.groups,
            transition=self.transition,
            actions=Actions.concatenate(self._actions),
            candidates=candidates,
            cost=Cost(
                nfe=(self.policy.num_evaluations - evaluations) / number,
                decodes=(self.policy.num_decodes - decodes) / number,
                rewards=self._num_judged / number,
            ),
            all_rewards=candidates.reward,
            diversity=torch.stack([s.std(0, correction=0).mean() for s in small]),
            duplicates=torch.tensor([float(len(s) - len(s.unique(dim=0))) for s in small]),
            step_std=dict(sorted(self._step_std.items())),
            weights={r.label: r.weight_at(self.scorer.iteration) for r in self.scorer.rewards},
            media=torch.cat([s.media for s, _ in done if s.media is not None])
            if self.scorer.keeps_media
            else None,
            shapes={r.label: r.shaped for r in self.scorer.rewards},
        )

    def _note(
        self,
        samples: Samples,
        record: StepRecord,
        state: Int[Tensor, " samples"],
        gaussian: Gaussian,
        x_next: Float[Tensor, "samples *latent"],
    ) -> None:
        assert isinstance(gaussian.std, float), "a step of the denoiser has one"
        self._step_std[record.step] = gaussian.std
        self._actions.append(
            Actions(
                states=record.x,
                state=state,
                x_next=x_next,
                step=torch.full((len(samples),), record.step),
                old_log_prob=gaussian.log_prob(x_next).cpu(),
                group=samples.group,
                sample=samples.sample,
                old_mean=gaussian.mean if self.policy.keeps_means else None,
            )
        )

    def _small_by_group(self) -> list[Tensor]:
        """The thumbnails of each group's compared candidates."""
        group = torch.cat([g for g, _ in self._thumbnails])
        small = torch.cat([t for _, t in self._thumbnails])
        return [small[group == g.index] for g in self.groups]


def subgrids(
    node: int, num_steps: int, granularities: Sequence[int], strides: Strides = "even"
) -> Mapping[tuple[int, ...], list[int]]:
    """The grid nodes from ``node`` to the data by each granularity, equal ones once.

    Args:
        node: Where they begin.
        num_steps: The node of the data.
        granularities: Intervals per step.
        strides: ``even`` takes steps of ``g`` intervals from ``node``; where they do not divide what
            is left, the last step is shorter. ``released`` is G2RPO's code: one interval first, then
            steps of ``g``; where they do not divide what is left, the last step is longer.

    Returns:
        The granularities that lead over each sub-grid, in the order in which they are given.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for granularity in granularities:
        if strides == "released":
            nodes = (node, *range(node + 1, num_steps + 1, granularity)[:-1], num_steps)
        else:
            nodes = (*range(node, num_steps, granularity), num_steps)
        found.setdefault(nodes, []).append(granularity)
    return found


def thumbnail(
    media: Float[Tensor, "batch *frames channels height width"],
) -> Float[Tensor, "batch pixels"]:
    """8x8 averages of an image, or of the middle frame of a video, to compare samples by."""
    image = media[:, media.shape[1] // 2] if media.ndim == 5 else media
    return F.adaptive_avg_pool2d(image, 8).flatten(1)
