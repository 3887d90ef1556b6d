"""The interface of an algorithm, and the interfaces of the policy and the reward scorer that it uses.

An algorithm knows neither a concrete policy nor a concrete scorer: it is typed against the protocols
:class:`Policy` and :class:`Scorer`, which ``flowgrpo.policy.PipelinePolicy`` and
``flowgrpo.rewards.scorer.RewardScorer`` implement.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.scores import Scores
from flowgrpo.core.solvers import Solver
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import Step, Transition
from flowgrpo.data.audio import Audio
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group, Image, Prompt
from flowgrpo.losses.base import ActionKind
from flowgrpo.policy.settings import Sampling
from flowgrpo.policy.step_plan import StepRecord


@runtime_checkable
class Algorithm(Protocol):
    """A frozen dataclass that is also the algorithm's configuration.

    :class:`AlgorithmBase` implements everything from ``action_kind`` on.

    Attributes:
        group_size: Samples per prompt.
        transition: The stochastic step.
        action_kind: The kind of action that :meth:`collect` yields. The loss must train on this
            kind, and ``initial_noise`` needs ``model.weights.kind = "noise"``.
        needs_rewards: Whether at least one reward must have a weight.
        needs_binary_rewards: Whether the advantages are defined only for one reward of 0 and 1.
        num_targets: Pictures of each training prompt that are trained on: 1, or 2 for pairs; 0 where
            pictures are sampled.
        scales_steps: Whether the advantages already bring the gradients of all steps to one scale.
    """

    @property
    def group_size(self) -> int: ...

    @property
    def transition(self) -> Transition: ...

    def collect(
        self,
        policy: "Policy",
        groups: Sequence[Group],
        scorer: "Scorer",
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, and hand each candidate to the scorer as soon as it is decoded.

        Args:
            policy: The policy to sample from.
            groups: The prompts of this process.
            scorer: Scores candidates in the background.
            random: Keyed by the iteration. A draw for a group may depend only on this, on the
                group's index and on the sample's index, so that the number of processes and the
                batch size change nothing.
            iteration: Counted from 0, for choices that follow a schedule.
        """
        ...

    def advantages(self, experience: Experience) -> Float[Tensor, "actions *rewards"]:
        """One advantage per action; exactly zero for actions that must not be trained on.

        With a second axis, an action has several: its loss is the sum of the losses for each.
        """
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other, or a grid of ``num_steps`` steps."""
        ...

    @property
    def action_kind(self) -> ActionKind: ...

    @property
    def needs_rewards(self) -> bool: ...

    @property
    def needs_binary_rewards(self) -> bool: ...

    @property
    def num_targets(self) -> int: ...

    @property
    def scales_steps(self) -> bool: ...

    def check_rewards(self, names: Sequence[str]) -> None:
        """Raise ValueError if the algorithm cannot work with rewards of these names."""
        ...

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """The steps whose density ratio is trained in an iteration, ascending; none without ratios.

        Args:
            num_steps: Steps of the sampling grid.
            iteration: Counted from 0.
            random: Keyed by the iteration, as in :meth:`collect`.
        """
        ...

    def cost(self, num_steps: int, iteration: int, random: Random) -> Cost:
        """The work of :meth:`collect` per prompt, computed beforehand; arguments as above."""
        ...

    def credit_view(self, experience: Experience) -> "CreditView":
        """How ``flowgrpo inspect`` shows the candidates and actions of an experience."""
        ...


def check_interface(algorithm: object) -> None:
    """Raise ValueError if an object lacks a part of :class:`Algorithm`."""
    names = [name for name in vars(Algorithm) if not name.startswith("_")]
    missing = [name for name in names if not hasattr(algorithm, name)]
    if missing:
        raise ValueError(
            f"{type(algorithm).__name__} has no {', '.join(missing)}; inherit from "
            "flowgrpo.algorithms.AlgorithmBase for the parts that follow from a sampling plan"
        )


@runtime_checkable
class Plan(Protocol):
    """How samples are drawn in one iteration, as far as others ask."""

    @property
    def steps(self) -> Sequence[int]:
        """The stochastic steps, ascending."""
        ...

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt on a grid of ``num_steps`` steps."""
        ...


class AlgorithmBase:
    """Defaults for the parts of :class:`Algorithm` that follow from a sampling plan.

    A subclass is a frozen dataclass with :meth:`plan`, ``collect``, ``advantages`` and ``check``;
    cost, trained steps and the inspection then need no code of their own. There is no sampling and
    no training here.
    """

    group_size: int
    action_kind: ClassVar[ActionKind] = "step"
    needs_rewards: ClassVar[bool] = True
    credits_trajectories: ClassVar[bool] = False
    """Whether all actions of a sample have one advantage, that of its candidate."""
    assigns_credit: ClassVar[bool] = True
    """Whether advantages come from scored candidates. If not, rewards are optional and only measured, and
    nothing that chooses or weights samples by their rewards applies."""
    num_targets: ClassVar[int] = 0
    least_group_size: ClassVar[int] = 2
    """The smallest group; 1 for algorithms that do not compare the samples of a group."""
    compares_texts: ClassVar[bool] = False
    """Whether images are scored for several texts, so that a reward must read its prompt."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> Plan:
        """The plan of an iteration: a ``TrajectoryPlan`` or a ``BranchPlan``, for instance."""
        raise NotImplementedError(f"{type(self).__name__} defines no plan(...)")

    @property
    def needs_binary_rewards(self) -> bool:
        """By the kind of the field ``advantage``, if there is such a field."""
        return bool(getattr(getattr(self, "advantage", None), "is_binary", False))

    @property
    def needs_baseline(self) -> bool:
        """Whether the loop must supply ``Experience.expected``: not for comparisons within groups."""
        return False

    @property
    def collect_reads_scores(self) -> bool:
        """Whether ``collect`` uses the scores; then they cannot be computed after it (``train.staleness``)."""
        return bool(getattr(getattr(self, "previews", None), "number", 0))

    @property
    def scales_steps(self) -> bool:
        """Advantages do not depend on the scale of a step's gradient."""
        return False

    def check_rewards(self, names: Sequence[str]) -> None:
        """Accept rewards of any name."""

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """The stochastic steps of the plan."""
        return self.plan(num_steps, iteration, random).steps

    def cost(self, num_steps: int, iteration: int, random: Random) -> Cost:
        """The cost of the plan."""
        return self.plan(num_steps, iteration, random).cost(num_steps)

    def samplings(self, own: Sampling) -> Sequence[Sampling]:
        """Arguments of the pipeline's calls that differ from the policy's ``own``; none by default.

        They are checked before the first iteration.
        """
        return []

    def credit_view(self, experience: Experience) -> "CreditView":
        """Candidates are whole samples, compared within their group."""
        return CreditView(rivals=self.group_size)


def _own_number(sample: int, step: int) -> int:
    return sample


@dataclass(frozen=True)
class CreditView:
    """How the inspection shows an algorithm's candidates and actions.

    Attributes:
        rivals: Candidates are compared within blocks of this many samples of a group, by index, that
            have the same step and granularity.
        candidates: ``samples`` if candidates are whole samples; ``states`` if they are the states of
            one trajectory, so that the change from one to the next is shown; ``branches`` if each is
            a branch of its own from a path that the group shares.
        column: Maps a candidate's step to the step under which it is shown, where the two differ.
        action_sample: Maps a sample and a step to the sample under which that action is recorded.
        shares_baseline: Whether the candidate with the lowest step, which is completed for sample 0
            alone, belongs to every sample of its group.
        turning_points: The steps of turning points by group and sample.
    """

    rivals: int
    candidates: Literal["samples", "states", "branches"] = "samples"
    column: Mapping[int, int] = field(default_factory=dict)
    action_sample: Callable[[int, int], int] = _own_number
    shares_baseline: bool = False
    turning_points: Mapping[tuple[int, int], Sequence[int]] = field(default_factory=dict)


@runtime_checkable
class Rollout(Protocol):
    """One batch that was run through the pipeline.

    Attributes:
        rows: The rows of the requested samples that are in this batch.
        x: The last states, if they were not decoded.
        media: Decoded images ``(B, C, H, W)`` or videos ``(B, F, C, H, W)`` in [0, 1]; None if they
            were not asked for.
        records: The recorded steps, in order.
        audio: The sound of decoded videos, if the pipeline makes any.
    """

    @property
    def rows(self) -> range: ...

    @property
    def x(self) -> Float[Tensor, "batch *latent"] | None: ...

    @property
    def media(self) -> Float[Tensor, "batch *frames channels height width"] | None: ...

    @property
    def records(self) -> Sequence[StepRecord]: ...

    @property
    def audio(self) -> Audio | None: ...


@runtime_checkable
class Grid(Protocol):
    """The sampling grid; nodes are counted from 0 (noise) to ``num_steps`` (data)."""

    def interval(self, node: int, node_next: int) -> Step:
        """The signal and noise weights of a step between two nodes."""
        ...


@runtime_checkable
class Pictures(Protocol):
    """Encodes pictures to final states of the denoising loop."""

    def encode(
        self, prompts: Sequence[Prompt], pictures: Sequence[Image], streams: Sequence[Random]
    ) -> Float[Tensor, "batch *latent"]:
        """The states of pictures; a sample of the VAE's posterior is drawn from each stream."""
        ...


@runtime_checkable
class Policy(Protocol):
    """The part of a policy that algorithms use.

    Attributes:
        keeps_means: Whether actions must hold the means of their steps.
        num_evaluations: Denoiser evaluations so far, counted per sample and step.
        num_decodes: Decoded samples so far.
        scheduler: The sampling grid.
        sampling: Arguments of the pipeline's call.
        pictures: Encodes pictures.
    """

    @property
    def keeps_means(self) -> bool: ...

    @property
    def num_evaluations(self) -> int: ...

    @property
    def num_decodes(self) -> int: ...

    @property
    def scheduler(self) -> Grid: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def pictures(self) -> Pictures: ...

    def num_steps(self) -> int:
        """Steps of the sampling grid."""
        ...

    def run(
        self,
        prompts: Sequence[Prompt],
        noise: SampleNoise,
        *,
        nodes: Sequence[int] | None = None,
        x: Float[Tensor, "batch *latent"] | None = None,
        stochastic: Collection[int] = (),
        transition: Transition | None = None,
        record: Collection[int] = (),
        decode: bool = True,
        sampling: Sampling | None = None,
        solver: Solver = "euler",
    ) -> Iterator[Rollout]:
        """Sample without gradients, batch by batch, so that scoring can proceed meanwhile.

        Args:
            prompts: One per sample.
            noise: One random stream per sample.
            nodes: Nodes of the grid to step through, ascending; all by default. A subset makes
                larger steps.
            x: States to start from at ``nodes[0]``; by default the pipeline's initial latents.
            stochastic: Steps that follow ``transition``; the others follow the ODE.
            transition: The stochastic step.
            record: Steps to record.
            decode: Whether to decode the last states.
            sampling: Arguments of the pipeline's call, if not :attr:`sampling`.
            solver: Solver of the deterministic steps after the last stochastic one.
        """
        ...

    def replay(
        self,
        prompts: Sequence[Prompt],
        x: Float[Tensor, "batch *latent"],
        step: int,
        transition: Transition,
    ) -> StepRecord:
        """Run one step again with gradients; step -1 is the draw of the initial noise."""
        ...


@runtime_checkable
class PairwiseScorer(Protocol):
    """Has the pairs of whole groups compared by a pairwise judge."""

    def submit(
        self, media: Float[Tensor, "group *frames channels height width"], prompt: Prompt
    ) -> "Future[Tensor]":
        """Compute the win rates of a whole group in the background."""
        ...

    def check_rate(self) -> None:
        """Raise RewardError if too many comparisons got no verdict."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """The part of a reward scorer that algorithms use.

    Attributes:
        keeps_media: Whether the experience must hold the media of its candidates.
    """

    @property
    def keeps_media(self) -> bool: ...

    def reset(self) -> None:
        """Start counting failures and time anew."""
        ...

    def submit(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None
    ) -> "Future[Scores]":
        """Score a batch in the background. Media are ``(B, ...)`` in [0, 1], ``audio`` their sound."""
        ...

    def pairwise_scorer(self, preference: Any) -> PairwiseScorer:
        """Make a scorer that compares pairs with a preference's judge, on this scorer's thread."""
        ...
