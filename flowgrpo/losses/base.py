"""The protocol between the learner and a loss.

The learner replays recorded actions with gradients, a batch at a time. It passes each batch to the
loss as :class:`LossInputs` and receives :class:`LossOutputs`: one loss per action. The learner sums
these, divides by the number of actions of the optimizer step on all processes, and backpropagates.

Some inputs cost work or memory (a second set of weights, a forward pass of another policy). A loss
declares which of them it needs (:class:`LossNeeds`), and the learner supplies these and no others.
The same declaration lets a configuration be checked before a model is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch
from flowgrpo.core.transitions import Gaussian, Prediction, Step, Transition
from flowgrpo.losses.fake_score import FakeScore
from flowgrpo.losses.teachers import Teachers

ActionKind = Literal[
    "step", "noised_sample", "visited_state", "initial_noise", "differentiated", "neighbor",
    "generated", "step_and_generated",
]  # fmt: skip
"""``step``: a stochastic denoising step with a log-probability. ``noised_sample``: a finished sample
with fresh noise, which has no log-probability; ``x_next`` is the clean sample. ``visited_state``: a
state of a trajectory, deterministic or not, whose step is compared with a teacher's. ``initial_noise``: the
draw of the initial latents, which has a log-probability but no ``interval`` and no step size.
``differentiated``: a state from which the reward of the decoded image is differentiated; it has no
log-probability. ``neighbor``: a deterministic step with the next state of another sample, whose
log-probability is that among the samples of the group. ``generated``: a state of a trajectory from which
the model predicts the data, ``x_next``, whose distribution is matched with a teacher's; it has no
log-probability. ``step_and_generated``: both, ``step`` and ``generated``."""


Trail = Literal["none", "third", "half", "late", "rising"]
"""How slowly the weights of the old policy follow the trained ones; see :func:`remaining_share`."""


def remaining_share(trail: Trail, num_updates: int) -> float:
    """The share of the old policy's weights that remains after an iteration, in [0, 1).

    With ``n`` optimizer steps so far: ``none`` is 0, which copies the trained weights; ``third`` is
    ``min(0.001 n, 0.3)`` (arXiv:2509.25050), ``half`` ``min(0.001 n, 0.5)`` and ``late``
    ``min(0.0075 max(n - 75, 0), 0.999)`` (arXiv:2509.16117), ``rising`` ``min(0.25 + 0.005 n, 0.999)``
    (arXiv:2603.14128).
    """
    n = num_updates
    shares = {
        "none": 0.0,
        "third": min(0.001 * n, 0.3),
        "half": min(0.001 * n, 0.5),
        "late": min(0.0075 * max(n - 75, 0), 0.999),
        "rising": min(0.25 + 0.005 * n, 0.999),
    }
    return shares[trail]


@dataclass(frozen=True)
class PolicyOutputs:
    """The outputs of one policy at the ``S`` states of a batch.

    Attributes:
        prediction: The model's output, and the data and noise that it implies; each ``(S, *latent)``.
        gaussian: The distribution of ``x_next`` that the transition makes of the prediction.
    """

    prediction: Prediction
    gaussian: Gaussian


@dataclass(frozen=True)
class WholeGroups:
    """All actions of the groups of a batch at its step, of which the batch holds a part.

    Attributes:
        term: What :meth:`Loss.group_term` gave for each, under the weights of this optimizer step.
        advantage: Advantages.
        group: Index of each action's group.
        known: Whether each action's reward is known.
    """

    term: Float[Tensor, " all"]
    advantage: Float[Tensor, " all"]
    group: Int[Tensor, " all"]
    known: Bool[Tensor, " all"]

    def of(
        self, values: Float[Tensor, " all"], group: Int[Tensor, " actions"]
    ) -> Float[Tensor, " actions"]:
        """For each action of a batch, the value of its group; ``values`` are equal within a group."""
        return values[(self.group == group[:, None]).float().argmax(1)]


@dataclass(frozen=True)
class LossInputs:
    """A batch of ``A`` actions of one denoising step that start from ``S`` distinct states.

    Several actions can share a state (G2RPO perturbs one state several times). The model runs once
    per state, so policies' outputs have ``S`` rows; :meth:`per_action` expands them to ``A`` rows.
    All tensors are on the policy's device.

    Attributes:
        policy: Outputs of the policy that is trained; they carry gradients.
        x: States before the step, fp32.
        state: For each action, its row in ``x``.
        x_next: States after the step, fp32. Where actions are noised samples
            (the action kind ``noised_sample``), the clean samples.
        old_log_prob: Log-probability of ``x_next`` under the policy that sampled it, the mean over
            latent elements; 0 for noised samples.
        advantage: Advantage of each action; exactly 0 where there is nothing to learn.
        group: Index of each action's group. Rows of one group share a prompt.
        sample: Index of each action's sample in its group.
        step: Index of the denoising step in the sampling grid; -1 for the initial noise.
        interval: The step's signal and noise weights.
        transition: The stochastic step.
        first_update: Whether no optimizer step has been taken since the actions were sampled.
        old_mean: Means of the steps under the policy that sampled. Before the first update these
            are the policy's own, without gradients. Supplied for ``LossNeeds.old_mean``.
        old_policy: Outputs of the behaviour policy. Supplied for ``LossNeeds.old_policy``.
        average: Outputs of the moving average of the weights. Supplied for ``LossNeeds.average``.
        reference: Outputs of the frozen reference. Supplied for ``LossNeeds.reference``.
        teacher: Outputs of the teacher of the batch's prompts. Supplied for ``LossNeeds.teachers``.
        has_reward: Whether all candidates of each action's sample have a reward; None if the caller
            does not know, which stands for all. Where it is false, the advantage is 0 for that reason.
        kl_weight: The weight that the learner gives :attr:`LossOutputs.kl` of each action, besides
            ``kl_coef``; None for 1.
        chunk_log_ratio: The mean over each action's chunk of the present log-ratios, without gradients.
            Supplied for ``LossNeeds.chunks``.
        whole: All actions of the batch's groups, where it holds a part of them
            (``LossNeeds.group_term``).
        reward: The reward of the image that each action leads to; it carries gradients. Supplied for
            ``LossNeeds.reward_gradient``.
        direction: The direction against which generated data moves to match the teacher's distribution;
            None if the batch's actions are steps. Supplied for ``LossNeeds.fake_score``.
    """

    policy: PolicyOutputs
    x: Float[Tensor, "states *latent"]
    state: Int[Tensor, " actions"]
    x_next: Float[Tensor, "actions *latent"]
    old_log_prob: Float[Tensor, " actions"]
    advantage: Float[Tensor, " actions"]
    group: Int[Tensor, " actions"]
    sample: Int[Tensor, " actions"]
    step: int
    interval: Step
    transition: Transition
    first_update: bool = True
    old_mean: Float[Tensor, "actions *latent"] | None = None
    old_policy: PolicyOutputs | None = None
    average: PolicyOutputs | None = None
    reference: PolicyOutputs | None = None
    teacher: PolicyOutputs | None = None
    has_reward: Bool[Tensor, " actions"] | None = None
    kl_weight: Float[Tensor, " actions"] | None = None
    chunk_log_ratio: Float[Tensor, " actions"] | None = None
    whole: WholeGroups | None = None
    reward: Float[Tensor, " actions"] | None = None
    direction: Float[Tensor, "actions *latent"] | None = None

    def per_action(self, values: Float[Tensor, "states *rest"]) -> Float[Tensor, "actions *rest"]:
        """Values of states, repeated for the actions that start there."""
        return values[self.state]

    def prediction(self, policy: PolicyOutputs) -> Prediction:
        """A policy's prediction at the state of each action."""
        p = policy.prediction
        return Prediction(*(self.per_action(part) for part in (p.x0, p.x1, p.output)))

    @property
    def gaussian(self) -> Gaussian:
        """The trained policy's distribution of each action's ``x_next``; means have ``A`` rows."""
        one = self.policy.gaussian
        return Gaussian(self.per_action(one.mean), one.std, one.normalised)


@dataclass(frozen=True)
class LossOutputs:
    """The result of a loss for one batch.

    Attributes:
        loss: One value per action, without the KL term. Averaged as the metric ``loss/policy``.
        kl: Distance to the reference per action, unless the loss has none. The learner adds
            ``kl_coef`` times this to the loss, and averages it as the metric ``loss/kl``.
        metrics: Values to log, under the names in :attr:`Loss.metrics`; any number of each.
    """

    loss: Float[Tensor, " actions"]
    kl: Float[Tensor, " actions"] | None = None
    metrics: Mapping[str, Float[Tensor, " _"]] = field(default_factory=dict)


@dataclass(frozen=True)
class LossMetric:
    """One metric that a loss logs. It is 0 in an iteration without values.

    Attributes:
        name: Its key in ``metrics.jsonl``.
        reduce: How the values of an iteration, over all processes, become one number.
        by_step: If given, the mean of each denoising step is logged too, as ``step/<step>/<by_step>``
            (with one process only: the processes of a larger run may train different steps).
    """

    name: str
    reduce: Literal["mean", "max"] = "mean"
    by_step: str = ""


@dataclass(frozen=True)
class LossNeeds:
    """The inputs that a loss needs, and the conditions under which it is defined.

    Attributes:
        action_kinds: The kinds of action that the loss is defined for; the algorithm has to collect
            one of them (:data:`ActionKind`).
        old_mean: The means of the steps under the policy that sampled. Algorithms record them
            where ``policy.keeps_means`` is set.
        old_policy: A second set of weights, the behaviour policy. It samples in place of the trained
            weights (but see ``old_policy_samples_from``), its outputs become ``LossInputs.old_policy``,
            and checkpoints contain it. The function maps the number of optimizer steps so far to the
            share of the behaviour weights that remains when they follow the trained weights after an
            iteration: 0 copies the trained weights, values near 1 follow slowly.
        old_policy_samples_from: Number of optimizer steps from which on the behaviour policy samples;
            before, the trained weights do. Infinite if they always do.
        old_policy_is_copied: The behaviour policy has the trained weights at the start of every
            iteration, so that its outputs need no forward pass of their own before the first update.
        single_update: The loss is defined in the first optimizer step of an iteration only.
        average: Outputs of the moving average of the weights, which ``train.ema_decay`` configures.
        reference: Outputs of the model that training started from.
        teachers: Teachers, whose outputs become ``LossInputs.teacher``. A batch has prompts of one teacher.
        reference_guidance: Guidance scale with which the reference is evaluated; None for that of
            training.
        all_actions: Actions whose advantage is 0 contribute to the gradient, too. Otherwise the
            learner does not compute them.
        whole_groups: A batch never splits the actions of one group and step. For losses that couple
            the samples of a group, such as those on pairs. Implies ``all_actions``.
        group_term: With ``whole_groups``: groups may be larger than a batch, because the loss couples them
            through one number per action, :meth:`Loss.group_term`. The learner computes it for the whole group
            first, without gradients, and supplies it as ``LossInputs.whole``.
        is_additive: The loss is proportional to the size of the advantage, so that the losses of several
            rewards can be added (advantages of the kind ``per_loss``).
        balanced_steps: The gradient of an action is proportional to that of its log-probability, so
            that a step with next to no noise would dominate all others. Such steps are refused.
        step_weight: A factor above 0 of the advantages of a step's actions. The learner divides it by its
            mean over the actions of the optimizer step on all processes.
        chunks: Numbers of consecutive denoising steps, from step 0 on, whose log-ratios are averaged for
            each sample (:attr:`LossInputs.chunk_log_ratio`). The learner weighs an action by 1 over the
            number of its chunk's actions, so that the loss is a mean over chunks. Empty for none.
        reward_gradient: The reward of the decoded image, with its gradient. Every reward with a weight
            must have one.
        fake_score: How the score of the policy's own samples is learned; with the teachers it gives
            :attr:`LossInputs.direction`. The teachers are then evaluated at noised samples alone.
    """

    action_kinds: Sequence[ActionKind] = ("step",)
    old_mean: bool = False
    old_policy: Callable[[int], float] | None = None
    old_policy_samples_from: int | float = 0
    old_policy_is_copied: bool = False
    single_update: bool = False
    average: bool = False
    reference: bool = False
    teachers: Teachers | None = None
    reference_guidance: float | None = None
    all_actions: bool = False
    whole_groups: bool = False
    group_term: bool = False
    is_additive: bool = False
    balanced_steps: bool = False
    step_weight: Callable[[Transition, Step], float] | None = None
    chunks: Sequence[int] = ()
    reward_gradient: bool = False
    fake_score: FakeScore | None = None


@runtime_checkable
class Loss(Protocol):
    """A frozen dataclass that is also its configuration, and maps a batch to a loss per action.

    A loss of one's own inherits from this class and implements ``__call__``; the other members have
    defaults. ``loss.kind`` names it by its import path.
    """

    metrics: ClassVar[Sequence[LossMetric]] = ()
    """Everything that :attr:`LossOutputs.metrics` may contain. Declared in advance, because all
    processes have to reduce the same metrics, even those without actions."""

    @property
    def kl_coef(self) -> float:
        """Weight of :attr:`LossOutputs.kl`."""
        return 0.0

    @property
    def needs(self) -> LossNeeds:
        """The inputs to supply."""
        return LossNeeds()

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each action of a batch."""
        ...

    def group_term(self, inputs: LossInputs) -> Float[Tensor, " actions"]:
        """The number of each action through which the loss couples a group (``LossNeeds.group_term``)."""
        raise NotImplementedError(f"{type(self).__name__} needs whole groups in a batch")

    def check(self) -> None:
        """Raise ValueError if the settings contradict each other or cannot train."""

    def check_algorithm(self, action_kind: ActionKind, transition: Transition) -> None:
        """Raise ValueError if the loss is not defined for an algorithm's actions or transition."""
        kinds = self.needs.action_kinds
        if action_kind not in kinds:
            raise ValueError(
                f"loss.kind and algorithm.kind do not belong together: {type(self).__name__} trains on "
                f"actions of the kind {' or '.join(map(repr, kinds))}, and the algorithm collects "
                f"{action_kind!r}; change one of them"
            )

    def warning(self, metrics: Mapping[str, float]) -> str:
        """A warning about an iteration's metrics, or nothing; shown once per run."""
        return ""


def check_interface(loss: object) -> None:
    """Raise ValueError if an object lacks a part of :class:`Loss`."""
    names = ["__call__", *(name for name in vars(Loss) if not name.startswith("_"))]
    missing = [n for n in names if not hasattr(loss, n)]
    if type(loss).__call__ is Loss.__call__:  # inherited, and returns nothing
        missing = ["__call__"]
    if missing:
        raise ValueError(
            f"{type(loss).__name__} has no {', '.join(missing)}; inherit from flowgrpo.losses.base.Loss, "
            "which has all parts but __call__"
        )


def check_outputs(loss: Loss, outputs: LossOutputs, inputs: LossInputs) -> None:
    """Refuse outputs of a loss from which the learner cannot train.

    Raises:
        ValueError: If they are not one value per action, have no gradient, or lack the KL to which
            ``kl_coef`` belongs.
    """
    name = type(loss).__name__
    for part, values in (("loss", outputs.loss), ("kl", outputs.kl)):
        if values is not None and values.shape != inputs.advantage.shape:
            raise ValueError(
                f"{name} returned {part} of shape {tuple(values.shape)}; it must return one value per action, "
                f"shape {tuple(inputs.advantage.shape)}"
            )
    if loss.kl_coef == 0:
        counted = outputs.loss
    elif outputs.kl is None:
        raise ValueError(
            f"loss.kl_coef is {loss.kl_coef:g}, and {name} returned no kl, so it would have no effect; return "
            "LossOutputs(loss, kl=...), for instance of flowgrpo.losses.base.velocity_kl, or set loss.kl_coef = 0"
        )
    else:
        counted = outputs.kl
    if torch.is_grad_enabled() and not counted.requires_grad:
        part = "loss" if counted is outputs.loss else "kl"
        raise ValueError(
            f"{name} returned a {part} without a gradient, so it would train nothing; compute it from "
            "inputs.policy or inputs.gaussian, without detach() and torch.no_grad()"
        )


def velocity_kl(policy: PolicyOutputs, reference: PolicyOutputs) -> Float[Tensor, " states"]:
    """Mean square of the difference of two policies' model outputs."""
    gap = policy.prediction.output - reference.prediction.output
    return gap.float().square().flatten(1).mean(1)
