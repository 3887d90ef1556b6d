"""Distribution matching for models of a few steps (DMD), by itself or beside a policy gradient (RTDMD).

The KL of the generator's distribution from a teacher's, at a noised sample ``x_t = signal x + noise e``,
has a gradient with respect to the sample ``x`` that is the difference of two scores: that of the
generator's own samples, which a further model learns (the *fake score*), and the teacher's. In terms of
the data that the two predict at ``x_t`` (DMD, arXiv:2311.18828; the divisor is that of the
released code of DMD2, arXiv:2405.14867, and of RTDMD)::

    d    = (x0_fake(x_t) - x0_teacher(x_t)) / mean |x - x0_teacher(x_t)|
    loss = weight / 2 * mean (x - sg(x - d))^2            whose gradient is that of weight * mean(sg(d) x)

RTDMD (arXiv:2605.26108) adds it at the last step to a clipped policy gradient at earlier, stochastic steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.core.tensors import torch
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
)
from flowgrpo.losses.checks import require_at_least
from flowgrpo.losses.clipped import clipped_surrogate
from flowgrpo.losses.fake_score import FakeScore
from flowgrpo.losses.teachers import Teacher, Teachers


@dataclass(frozen=True, kw_only=True)
class DMDLoss(Loss):
    """Distribution matching against teachers, with a fake score that is trained beside the policy.

    Belongs to the algorithm ``dmd``, which distils a model to the few steps of ``sampling`` without a
    reward, and to ``rtdmd``, which also maximises rewards.
    """

    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("matching/gap", by_step="matching_gap"),
        LossMetric("ratio/deviation"),
        LossMetric("ratio/clip_fraction"),
        LossMetric("log_prob/noise", "max"),
    )

    kind: Literal["dmd"] = "dmd"
    teachers: tuple[Teacher, ...] = (Teacher(),)
    """The models whose distribution is matched, as tables ``[[loss.teachers]]``; each prompt has one of them.
    By default the model before training, which is right where that is not yet a model of a few steps. If
    training starts from an adapter (``model.weights.init``), ``path = "pipeline"`` is the model without it."""
    task_key: str = "tag"
    """The key of a prompt's metadata by whose value a teacher with ``tags`` is chosen."""
    weight: float = 1.0
    """Weight of the matching; RTDMD has 1e-3 beside the policy gradient."""
    fake: FakeScore = field(default_factory=FakeScore)
    """The fake score."""
    clip_range: float = 1e-5
    """With ``rtdmd``, largest change of a step's ratio. An iteration has one optimizer step, so that the
    ratio is 1 and the clip does not act, as in RTDMD."""

    @property
    def needs(self) -> LossNeeds:
        """Generated samples, and stochastic steps with ``rtdmd``; the teachers and the fake score."""
        return LossNeeds(
            action_kinds=("generated", "step_and_generated"),
            single_update=True,
            teachers=Teachers(self.teachers, self.task_key),
            fake_score=self.fake,
            balanced_steps=True,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The matching of generated samples, or the clipped loss of stochastic steps."""
        if inputs.direction is not None:
            data = inputs.prediction(inputs.policy).x0.float()
            aim = (data - inputs.direction).detach()
            loss = self.weight / 2 * (data - aim).square().flatten(1).mean(1)
            gap = inputs.direction.square().flatten(1).mean(1).sqrt()
            return LossOutputs(loss, None, {"matching/gap": gap})
        log_ratio = inputs.gaussian.log_prob(inputs.x_next) - inputs.old_log_prob
        loss = clipped_surrogate(log_ratio, inputs.advantage.to(log_ratio), self.clip_range)
        change = torch.expm1(log_ratio.detach()).abs()
        metrics = {
            "ratio/deviation": change,
            "ratio/clip_fraction": (change > self.clip_range).float(),
            "log_prob/noise": log_ratio.detach().abs(),
        }
        return LossOutputs(loss, None, metrics)

    def check(self) -> None:
        """Raise ValueError if the teachers contradict each other, or a setting cannot train."""
        Teachers(self.teachers, self.task_key).check()
        self.fake.check()
        require_at_least("weight", self.weight, 1e-12)
        require_at_least("clip_range", self.clip_range, 1e-12)
