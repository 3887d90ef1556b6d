"""Recording one iteration: actions, candidates and their cost, as an :class:`Experience`.

Every algorithm's ``collect`` creates :class:`Samples` (the rows of a batch), runs the policy, and
reports to a :class:`Collection`: the steps that were taken, and the media to score.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.previews import Chosen
from flowgrpo.core.guards import thumbnail
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Float, Int, Tensor, torch
from flowgrpo.core.transitions import ODE, Gaussian, Transition
from flowgrpo.data.audio import Audio
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience, Latents
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.policy.step_plan import StepRecord

Strides = Literal["even", "released"]

PROJECTION = 0
"""The granularity of a candidate that was decoded from the model's prediction of the data."""


@dataclass(frozen=True)
class Samples:
    """The rows of a batch: the sample that each row belongs to, and its noise.

    Attributes:
        groups: The group of each row.
        numbers: The index of each row's sample in its group.
        noise: The random streams of each row.

    Example:
        ``samples[::6]`` are the first of every six samples, which represent a state that six share.
    """

    groups: Sequence[Group]
    numbers: Sequence[int]
    noise: SampleNoise

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        size: int,
        random: Random,
        num_seeds: int | None = None,
        seeds: Mapping[int, Sequence[int]] | None = None,
    ) -> "Samples":
        """``size`` samples of each group; the samples of a group are consecutive.

        Args:
            groups: The prompts.
            size: Samples per group.
            random: Keyed by the iteration.
            num_seeds: Initial noises per group, each shared by equally many consecutive samples;
                None gives every sample its own.
            seeds: The number of the noise of each sample, by group; by default the sample's own number.
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
        streams = [
            random.at("group", g.index, i if seeds is None else seeds[g.index][i])
            for g, i in owners
        ]
        return cls([g for g, _ in owners], [i for _, i in owners], SampleNoise(streams, initial))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples(self.groups[rows], self.numbers[rows], self.noise[rows])

    def take(self, rows: Sequence[int]) -> "Samples":
        """Some of the rows, without streams of their own for the initial latents."""
        noise = SampleNoise([self.noise.streams[i] for i in rows])
        return Samples([self.groups[i] for i in rows], [self.numbers[i] for i in rows], noise)

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


OnBatch = Callable[[Samples, Tensor], None]
"""A callback that receives every batch of samples and media that is scored."""


@dataclass(frozen=True)
class _Submission:
    """A batch that is being scored."""

    samples: Samples
    step: int
    granularity: int
    scores: "Future[Scores]"
    media: Tensor | None


class Collection:
    """Collects the experience of one iteration."""

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        transition: Transition,
        on_batch: OnBatch | None = None,
    ):
        """Start counting work.

        Args:
            policy: The policy that is sampled.
            groups: The prompts.
            scorer: Scores the candidates; its counts are reset.
            transition: The stochastic step.
            on_batch: Called with every batch that is scored.
        """
        scorer.reset()
        self._on_batch = on_batch
        self.policy, self.groups, self.scorer, self.transition = policy, groups, scorer, transition
        self._before = policy.num_evaluations, policy.num_decodes
        self._actions: list[Actions] = []
        # Each recorded tensor of states once: the state after a step is the one before the next.
        self._blocks: list[Tensor] = []
        self._offsets: dict[int, int] = {}
        self._num_states = 0
        self._submissions: list[_Submission] = []
        self._num_scored = 0
        self._thumbnails: list[tuple[Tensor, Tensor]] = []
        self._step_std: dict[int, float] = {}
        self.chosen: Chosen | None = None
        """What previews have chosen, if there were any."""

    def add_actions(
        self,
        samples: Samples,
        step: int,
        *,
        x: Float[Tensor, "states *latent"],
        x_next: Float[Tensor, "ends *latent"],
        state: Int[Tensor, " samples"] | None = None,
        next_row: Int[Tensor, " samples"] | None = None,
        old_log_prob: Float[Tensor, " samples"] | None = None,
        old_mean: Float[Tensor, "samples *latent"] | None = None,
        guidance: float | None = None,
        generated: bool = False,
    ) -> None:
        """Record an action of each sample, from a row of ``x`` to a row of ``x_next``.

        A tensor of states that was recorded before is not stored again.

        Args:
            samples: The samples.
            step: The step of the actions.
            x: States before them.
            x_next: States after them.
            state: The row of ``x`` for each action; one after another by default.
            next_row: The row of ``x_next`` for each action; one after another by default.
            old_log_prob: Log-probability of each action under the policy that samples; 0 by default, for
                actions whose density is not trained.
            old_mean: Means of the actions under it.
            guidance: Guidance scale with which the model is trained on them; None for that of
                ``sampling``. Either all actions of an iteration have one, or none.
            generated: Whether ``x_next`` is the data that the model predicts at ``x``.
        """
        rows, zeros = torch.arange(len(samples)), torch.zeros(len(samples))
        before, after = self._offset_of(x), self._offset_of(x_next)
        self._actions.append(
            Actions(
                states=Latents([x_next[:0]]),
                state=before + (rows if state is None else state),
                next_state=after + (rows if next_row is None else next_row),
                step=torch.full((len(samples),), step),
                old_log_prob=zeros if old_log_prob is None else old_log_prob,
                group=samples.group,
                sample=samples.sample,
                old_mean=old_mean,
                guidance=None if guidance is None else torch.full((len(samples),), float(guidance)),
                generated=torch.ones(len(samples), dtype=torch.bool) if generated else None,
            )
        )

    def _offset_of(self, states: Tensor) -> int:
        """The row of the first of these states among all that are recorded."""
        if id(states) not in self._offsets:
            self._offsets[id(states)] = self._num_states
            # Held, so that no other tensor gets its id.
            self._blocks.append(states)
            self._num_states += len(states)
        return self._offsets[id(states)]

    def add_step(self, samples: Samples, record: StepRecord) -> None:
        """Record a stochastic step that each sample took from a state of its own."""
        own = torch.arange(len(samples))
        self._add(samples, record, own, record.gaussian, record.x_next)

    def branch(self, samples: Samples, record: StepRecord) -> Float[Tensor, "samples *latent"]:
        """Take one stochastic step per sample from recorded states that several samples share.

        The recorded forward pass serves all of them: only the noise differs between the samples of a
        state. The step that the policy itself took from there is not used.

        Args:
            samples: ``n`` consecutive samples for each of the recorded states.
            record: A step from ``len(samples) / n`` states.

        Returns:
            The state of each sample after its step.
        """
        gaussian = self.transition(record.x, record.prediction, record.interval)
        # The row of the shared state for each sample: 0, 0, ..., 1, 1, ...
        state = torch.arange(len(record.x)).repeat_interleave(len(samples) // len(record.x))
        spread = Gaussian(
            gaussian.mean[state.to(gaussian.mean.device)], gaussian.std, gaussian.normalised
        )
        noise = samples.noise.at_step(record.step, record.x.shape[1:])
        x_next = spread.sample(noise.to(spread.mean.device))
        self._add(samples, record, state, spread, x_next)
        return x_next

    def submit(
        self,
        samples: Samples,
        media: Float[Tensor, "samples *frames channels height width"],
        step: int,
        granularities: Sequence[int] = (1,),
        compare: bool = True,
        audio: Audio | None = None,
    ) -> None:
        """Score decoded candidates.

        Args:
            samples: The samples that they belong to.
            media: In [0, 1].
            step: The step after which they were completed.
            granularities: The granularities that lead to these candidates; each gets a candidate,
                but they are scored once.
            compare: Whether they count in the group's diversity and duplicates.
            audio: Their sound, for rewards that need it.
        """
        scores = self.scorer.submit(media, samples.prompts, audio)
        if self._on_batch is not None:
            self._on_batch(samples, media)
        self._num_scored += len(samples)
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
        nodes: Sequence[int] = (),
        compare: bool = True,
    ) -> None:
        """Follow the ODE from states to the data, decode, and score.

        Completions on several sub-grids start from the same state, so they share its forward pass;
        equal sub-grids share the whole completion.

        Args:
            samples: The samples that the states belong to.
            x: The states.
            node: The grid node of the states; states at the last node are decoded as they are.
            step: The step that the candidates judge.
            granularities: Grid intervals per step.
            strides: See :func:`subgrids`.
            nodes: The nodes to step through, from ``node`` to the last, in place of those that
                granularities and strides give.
            compare: As in :meth:`submit`.
        """
        end = self.policy.num_steps()
        grids = {tuple(nodes): [1]} if nodes else subgrids(node, end, granularities, strides)
        (nodes, same), *others = grids.items()
        for rollout in self.policy.run(
            samples.prompts, samples.noise, nodes=nodes, x=x, record=[node] if others else []
        ):
            assert rollout.media is not None
            part = samples[rollout.rows.start : rollout.rows.stop]
            self.submit(part, rollout.media, step, same, compare, rollout.audio)
            for grid, equal in others:
                # The first step of the other sub-grids, from the recorded forward pass.
                (record,) = rollout.records
                interval = self.policy.scheduler.interval(grid[0], grid[1])
                x_next = ODE()(record.x, record.prediction, interval).mean
                (rest,) = self.policy.run(part.prompts, part.noise, nodes=grid[1:], x=x_next)
                assert rest.media is not None
                self.submit(part, rest.media, step, equal, False, rest.audio)

    def project(self, samples: Samples, record: StepRecord, compare: bool = False) -> None:
        """Decode and score the model's prediction of the data at the start of a recorded step.

        The candidates judge the step before it. This needs no forward pass of its own.

        Args:
            samples: The samples of the record's rows.
            record: The step.
            compare: As in :meth:`submit`.
        """
        end, x0 = self.policy.num_steps(), record.prediction.x0
        for rollout in self.policy.run(samples.prompts, samples.noise, nodes=[end], x=x0):
            assert rollout.media is not None
            part = samples[rollout.rows.start : rollout.rows.stop]
            self.submit(part, rollout.media, record.step - 1, [PROJECTION], compare, rollout.audio)

    def experience(self) -> Experience:
        """Wait for the scorer and return the whole experience."""
        done = [(s, s.scores.result()) for s in self._submissions]
        each = [
            Candidates(
                group=s.samples.group,
                sample=s.samples.sample,
                step=torch.full((len(s.samples),), s.step),
                granularity=torch.full((len(s.samples),), s.granularity),
                scores=scores,
            )
            for s, scores in done
        ]
        candidates = Candidates.concatenate(each) if each else Candidates.none()
        small = self._thumbnails_by_group()
        evaluations, decodes = self._before
        number = len(self.groups)
        previewed = 0 if self.chosen is None else self.chosen.number
        nothing = torch.full((number,), torch.nan)
        return Experience(
            groups=self.groups,
            transition=self.transition,
            actions=replace(Actions.concatenate(self._actions), states=Latents(self._blocks)),
            candidates=candidates,
            cost=Cost(
                nfe=(self.policy.num_evaluations - evaluations) / number,
                decodes=(self.policy.num_decodes - decodes) / number,
                rewards=self._num_scored / number + previewed,
            ),
            diversity=torch.stack([s.std(0, correction=0).mean() for s in small])
            if small
            else nothing,
            duplicates=torch.tensor([float(len(s) - len(s.unique(dim=0))) for s in small])
            if small
            else nothing,
            step_std=dict(sorted(self._step_std.items())),
            media=torch.cat([s.media for s, _ in done if s.media is not None])
            if self.scorer.keeps_media
            else None,
            by_group={} if self.chosen is None else self.chosen.metrics(self.groups, candidates),
        )

    def _add(
        self,
        samples: Samples,
        record: StepRecord,
        state: Int[Tensor, " samples"],
        gaussian: Gaussian,
        x_next: Float[Tensor, "samples *latent"],
    ) -> None:
        """Record a step of each sample from the row ``state`` of the recorded states."""
        assert isinstance(gaussian.std, float), "a denoising step has one standard deviation"
        self._step_std[record.step] = gaussian.std
        self.add_actions(
            samples,
            record.step,
            x=record.x,
            x_next=x_next,
            state=state,
            old_log_prob=gaussian.log_prob(x_next).cpu(),
            old_mean=gaussian.mean if self.policy.keeps_means else None,
        )

    def _thumbnails_by_group(self) -> list[Tensor]:
        """The thumbnails of each group's compared candidates; none if nothing was decoded."""
        if not self._thumbnails:
            return []
        group = torch.cat([g for g, _ in self._thumbnails])
        small = torch.cat([t for _, t in self._thumbnails])
        return [small[group == g.index] for g in self.groups]


def coarse_nodes(node: int, num_steps: int, most: int) -> list[int]:
    """The nodes of a completion in at most ``most`` steps of about equal numbers of grid intervals.

    Args:
        node: The first node.
        num_steps: The node of the data.
        most: Largest number of steps; 0 for all steps of the grid.
    """
    left = num_steps - node
    number = min(most, left) if most else left
    return [node + round(left * i / number) for i in range(number + 1)] if number else [node]


def subgrids(
    node: int, num_steps: int, granularities: Sequence[int], strides: Strides = "even"
) -> Mapping[tuple[int, ...], list[int]]:
    """The grid nodes from ``node`` to the data for each granularity; equal sub-grids appear once.

    Args:
        node: The first node.
        num_steps: The node of the data.
        granularities: Intervals per step.
        strides: ``even`` takes steps of ``g`` intervals from ``node`` on; if ``g`` does not divide
            the rest of the grid, the last step is shorter. ``released`` is G2RPO's released code:
            one interval first, then steps of ``g``; if ``g`` does not divide the rest, the last step
            is longer.

    Returns:
        For each sub-grid the granularities that use it, in the given order.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for granularity in granularities:
        if strides == "released":
            nodes = (node, *range(node + 1, num_steps + 1, granularity)[:-1], num_steps)
        else:
            nodes = (*range(node, num_steps, granularity), num_steps)
        found.setdefault(nodes, []).append(granularity)
    return found
