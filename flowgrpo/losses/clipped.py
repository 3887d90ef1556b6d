"""Clipped policy gradient on the log-probabilities of stochastic steps.

PPO's objective (arXiv:1707.06347) by default, with alternatives: GRPO-Guard's ratio (arXiv:2510.22319),
Flow-DPPO's bound on a KL in place of one on the ratio (arXiv:2606.11025), Flash-GRPO's weight of a step
(arXiv:2605.15980) and Chunk-GRPO's ratio of several steps (arXiv:2510.21583).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.tensors import Bool, Float, Tensor, torch
from flowgrpo.core.transitions import (
    CPS,
    DDIM,
    CalibratedSDE,
    DanceSDE,
    FlowSDE,
    Gaussian,
    Prediction,
    Step,
    StepwiseSDE,
    Transition,
    gaussian_kl,
)
from flowgrpo.losses.base import (
    ActionKind,
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
    PolicyOutputs,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least

DEFAULT_BOUNDS: Mapping[str, float] = {"ratio": 1e-4, "kl": 1e-6}
"""``clip_range`` by what it bounds. Flow-DPPO's authors use 1e-7 for the Flow-SDE and 1e-6 for CPS
(arXiv:2606.11025, appendix F.2); released code has 1e-6 to 1e-5. With a KL of ``D``, the mean over
``n`` latent elements, the log-ratio has the standard deviation ``sqrt(2 D / n)``."""


def clipped_surrogate(
    log_ratio: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    low: float,
    high: float | None = None,
) -> Float[Tensor, " actions"]:
    """PPO's pessimistic objective as a loss (arXiv:1707.06347, eq. 7).

    ``max(-A r, -A clip(r, 1 - low, 1 + high))`` with ``r = exp(log_ratio)``; ``high`` is ``low``
    unless given.
    """
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - low, 1 + (low if high is None else high))
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def bounded_surrogate(
    log_ratio: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    moved: Float[Tensor, " actions"],
    bound: float,
) -> Float[Tensor, " actions"]:
    """``-A r``, and 0 for actions beyond the bound that would move further away (arXiv:2606.11025).

    Args:
        log_ratio: Log of the ratio ``r``.
        advantage: Advantage ``A``.
        moved: KL of the step's distribution from the old policy's.
        bound: The ``moved`` above which only actions that reduce it are trained on.
    """
    moves_away = advantage * log_ratio.detach() > 0
    trained = ~(moves_away & (moved.detach() > bound))
    return -advantage * torch.exp(log_ratio) * trained


def guarded_log_ratio(
    mean: Float[Tensor, "actions *latent"],
    old_mean: Float[Tensor, "actions *latent"],
    x_next: Float[Tensor, "actions *latent"],
    std: float,
) -> Float[Tensor, " actions"]:
    """GRPO-Guard's log-ratio (arXiv:2510.22319): centred on 0, and on one scale for all steps.

    With ``x_next = old_mean + std * noise`` the log-ratio of two normals is
    ``<d, noise> / std - |d|^2 / (2 std^2)``, where ``d = mean - old_mean``. Its expectation is below
    0, and its scale depends on ``std``. Without the second term and times ``std`` it becomes
    ``<d, noise>``, as everywhere the mean over latent elements.

    The released code averages the second term over the batch as well; this function does not.
    """
    old = old_mean.detach().float()
    noise = (x_next.detach().float() - old) / std
    return ((mean.float() - old) * noise).flatten(1).mean(1)


def step_gain(transition: Transition, step: Step) -> float:
    """The derivative of the step's mean with respect to the model's output, as a size above 0.

    The output is of the kind that the model predicts (``step.predicted``). Every transition is
    linear in it, so that one evaluation at ``x = 0`` gives the derivative.
    """
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return abs(float(transition(zero, Prediction.from_output(zero, one, step), step).mean))


def guard_weight(transition: Transition, step: Step) -> float:
    """GRPO-Guard's weight of a step, which gives the gradients of all steps the same size.

    ``1 / dt`` for the SDEs, as published: their mean changes by about ``dt`` per unit of velocity.
    Other transitions have no such factor; their weight is ``1 / step_gain``, which for
    coefficients-preserving sampling tends to ``1 / dt`` as its noise level tends to 0.
    """
    if isinstance(transition, FlowSDE | DanceSDE | CalibratedSDE):
        return 1 / step.dt
    return 1 / step_gain(transition, step)


def rectified_weight(transition: Transition, step: Step) -> float:
    """Flash-GRPO's weight of a step: 1 over the size of the gradient of its log-probability.

    With ``mean`` linear in the model's output, the derivative of the log-probability by the output, per
    unit of noise, is ``step_gain / std``. For the SDEs that is ``sqrt(dt) / g + g sqrt(dt) (1 - sigma) /
    (2 sigma)``, as published (arXiv:2605.15980); the formula here holds for every transition. The learner
    divides weights by their mean over an optimizer step; the released code by that of each micro-batch.
    """
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    std = transition(zero, Prediction.from_output(zero, one, step), step).std
    return float(std) / step_gain(transition, step)


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(Loss):
    """Clipped surrogate plus ``kl_coef`` times a KL to the reference."""

    is_default: ClassVar[bool] = True
    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("log_prob/noise", reduce="max"),
        LossMetric("ratio/deviation", by_step="ratio_deviation"),
        LossMetric("ratio/clip_fraction", by_step="clip_fraction"),
    )

    kind: Literal["clipped"] = "clipped"
    ratio: Literal["plain", "guard"] = "plain"
    """``plain`` is the ratio of densities; ``guard`` is GRPO-Guard's, which is centred and has the
    same scale and weight at all steps. Its clip ranges are smaller: 2e-6 to 4e-6 as published."""
    clip: Literal["ratio", "kl"] = "ratio"
    """The quantity that ``clip_range`` bounds: the ratio, or (Flow-DPPO) the KL of the step's
    distribution from the old policy's. Both bounds act from the second optimizer step of an iteration
    on (``train.updates`` or ``train.epochs`` above 1): in the first, nothing has moved."""
    clip_range: float | None = None
    """Largest change of the ratio in one iteration, or with ``clip = "kl"`` largest KL. Unset, it is
    1e-4 for the ratio and 1e-6 for the KL. Both are of means over latent elements, so that the right
    value depends on the resolution."""
    clip_high: float | None = None
    """Largest increase of the ratio, if it differs from the largest decrease; unset as ``clip_range``."""
    step_weight: Literal["none", "rectified"] = "none"
    """Factor of the loss of a step: ``rectified`` is Flash-GRPO's, which gives the gradients of all steps
    the same size, divided by its mean over an optimizer step."""
    chunks: tuple[int, ...] = ()
    """Numbers of consecutive denoising steps, from step 0 on, that have one ratio in common (Chunk-GRPO):
    the geometric mean of their ratios, which is clipped as one. The loss is the mean over chunks. Empty
    for a ratio of each step."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model; 0 does not evaluate the reference at all."""
    kl: Literal["exact", "flow_grpo", "velocity"] = "exact"
    """``exact`` is the KL of the step's normals; ``flow_grpo`` leaves out the step's length, as the
    code behind that paper's 0.04 does; ``velocity`` is the squared difference of the outputs."""

    def __post_init__(self) -> None:
        """Set an unset bound, so that the configuration in a run's folder has the number."""
        if self.clip_range is None:
            object.__setattr__(self, "clip_range", DEFAULT_BOUNDS[self.clip])

    @property
    def bound(self) -> float:
        """``clip_range``, which is set."""
        assert self.clip_range is not None
        return self.clip_range

    @property
    def needs(self) -> LossNeeds:
        """Old means for the guarded ratio and the KL bound, the reference for a KL."""
        old_mean, has_kl = self.ratio == "guard" or self.clip == "kl", self.kl_coef > 0
        # The initial noise has a log-probability, but no old means and no step size.
        by_step = self.step_weight != "none" or bool(self.chunks)
        needs_step = old_mean or by_step or self.kl == "flow_grpo"
        return LossNeeds(
            action_kinds=("step",) if needs_step else ("step", "initial_noise"),
            old_mean=old_mean,
            reference=has_kl,
            # An action without advantage still has a KL.
            all_actions=has_kl,
            is_additive=True,
            balanced_steps=self.ratio == "plain" and self.step_weight == "none",
            step_weight=rectified_weight if self.step_weight == "rectified" else None,
            chunks=self.chunks,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The clipped loss of each action, its ratio, and whether it is outside the clip range."""
        gaussian, reference = inputs.gaussian, inputs.reference
        log_ratio = self.log_ratio(gaussian, inputs.x_next, inputs.old_log_prob, inputs.old_mean)
        weight = guard_weight(inputs.transition, inputs.interval) if self.ratio == "guard" else 1.0
        change = log_ratio.detach()
        if inputs.chunk_log_ratio is not None:
            # The value of the chunk's ratio, and the gradient through this action's part of it. The
            # learner's weights make the sum of the parts the chunk's gradient.
            log_ratio = inputs.chunk_log_ratio.to(log_ratio) + log_ratio - change
        loss, outside = self.surrogate(
            log_ratio, inputs.advantage.to(log_ratio), gaussian, inputs.old_mean, weight
        )
        kl = None
        if reference is not None:
            kl = inputs.per_action(self.kl_to(inputs.policy, reference, inputs.interval))
        metrics = {
            "ratio/deviation": torch.expm1(log_ratio.detach()).abs(),
            "ratio/clip_fraction": outside.float(),
        }
        if inputs.first_update:
            # No weight has changed since the rollout, so any change is numerical noise.
            metrics["log_prob/noise"] = change.abs()
        return LossOutputs(loss, kl, metrics)

    def log_ratio(
        self,
        policy: Gaussian,
        x_next: Float[Tensor, "actions *latent"],
        old_log_prob: Float[Tensor, " actions"],
        old_mean: Float[Tensor, "actions *latent"] | None,
    ) -> Float[Tensor, " actions"]:
        """The log-ratio of the chosen form; ``plain`` does not use ``old_mean``."""
        if self.ratio == "plain":
            return policy.log_prob(x_next) - old_log_prob
        assert old_mean is not None
        assert isinstance(policy.std, float), "refused by the configuration"
        return guarded_log_ratio(policy.mean, old_mean, x_next, policy.std)

    def surrogate(
        self,
        log_ratio: Float[Tensor, " actions"],
        advantage: Float[Tensor, " actions"],
        policy: Gaussian,
        old_mean: Float[Tensor, "actions *latent"] | None,
        weight: float,
    ) -> tuple[Float[Tensor, " actions"], Bool[Tensor, " actions"]]:
        """The loss of each action, and whether the action is outside the clip range.

        ``weight`` is :func:`guard_weight`, for ``ratio = "guard"``.
        """
        if self.clip == "kl":
            assert old_mean is not None
            old = Gaussian(old_mean, policy.std)
            moved = gaussian_kl(policy, old).detach()
            loss = bounded_surrogate(log_ratio, advantage, moved, self.bound)
            outside = moved > self.bound
        else:
            high = self.bound if self.clip_high is None else self.clip_high
            loss = clipped_surrogate(log_ratio, advantage, self.bound, high)
            change = torch.expm1(log_ratio.detach())
            outside = (change < -self.bound) | (change > high)
        return (loss * weight if self.ratio == "guard" else loss), outside

    def kl_to(
        self, policy: PolicyOutputs, reference: PolicyOutputs, step: Step
    ) -> Float[Tensor, " states"]:
        """The chosen distance from the reference at each state."""
        if self.kl == "velocity":
            return velocity_kl(policy, reference)
        exact = gaussian_kl(policy.gaussian, reference.gaussian)
        return exact if self.kl == "exact" else exact * step.dt

    def check(self) -> None:
        """Raise ValueError if the settings contradict each other or cannot train."""
        require_at_least("clip_range", self.bound, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
        if self.clip_high is not None:
            require_at_least("clip_high", self.clip_high, 1e-12)
            if self.clip == "kl":
                raise ValueError("loss.clip_high has no meaning with loss.clip = 'kl'; remove it")
        if self.ratio == "guard" and self.step_weight != "none":
            raise ValueError(
                "loss.ratio = 'guard' already gives the gradients of all steps one size; remove "
                "loss.step_weight, or use loss.ratio = 'plain'"
            )
        if self.chunks and (self.ratio == "guard" or self.clip == "kl"):
            raise ValueError(
                "loss.chunks combines plain ratios of densities and bounds their mean; use loss.ratio = "
                "'plain' and loss.clip = 'ratio', or remove loss.chunks"
            )
        if any(size < 1 for size in self.chunks):
            raise ValueError(
                f"loss.chunks must be numbers of steps, each at least 1, got {list(self.chunks)}"
            )
        if self.kl != "exact" and self.kl_coef == 0:
            raise ValueError(
                f"loss.kl = {self.kl!r} is set but loss.kl_coef is 0; set a coefficient or remove loss.kl"
            )

    def check_algorithm(self, action_kind: ActionKind, transition: Transition) -> None:
        """Raise ValueError if the chosen forms are not defined for an algorithm."""
        if action_kind == "initial_noise" and action_kind not in self.needs.action_kinds:
            raise ValueError(
                "algorithm.kind = 'find' has no denoising step, which loss.ratio = 'guard', loss.clip = "
                "'kl', loss.kl = 'flow_grpo', loss.step_weight and loss.chunks need; leave them at 'plain', "
                "'ratio', 'exact', 'none' and []"
            )
        super().check_algorithm(action_kind, transition)
        if self.kl == "flow_grpo" and isinstance(transition, CPS | DDIM | StepwiseSDE):
            raise ValueError(
                "loss.kl = 'flow_grpo' leaves a factor dt out of the step's variance, but the variance "
                f"of {transition.kind!r} has no such factor; use loss.kl = 'exact', which is the KL that "
                "the released code computes for it"
            )

    def warning(self, metrics: Mapping[str, float]) -> str:
        """A warning if numerical noise alone moves ratios out of the clip range."""
        noise = metrics.get("log_prob/noise", 0.0)
        if self.clip != "ratio" or noise <= self.bound:
            return ""
        return (
            f"before any update, log-probabilities in the replay differ by up to {noise:.1e} from those "
            f"of the rollout, more than loss.clip_range = {self.bound:g}, so that clipping acts on "
            "this difference. If it is rounding, set train.train_batch equal to train.rollout_batch, use "
            "a higher model.dtype, or widen the clip range"
        )
