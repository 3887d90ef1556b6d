"""On-policy distillation: a student imitates teachers at the states that it visits itself.

DiffusionOPD (arXiv:2605.15055) and Flow-OPD (arXiv:2605.08063). Student and teacher start from the same
state ``x``, so that their steps are normals with the same standard deviation, and the divergence of one from
the other has a closed form. It needs no reward, no density and no advantage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import gaussian_kl
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
    PolicyOutputs,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least
from flowgrpo.losses.teachers import Teacher, Teachers

Target = Literal["mean", "output", "data"]


def distance(
    student: PolicyOutputs, teacher: PolicyOutputs, target: Target
) -> Float[Tensor, " states"]:
    """The distance of a student's step from a teacher's; the gradient is the student's.

    For ``mean`` it is the KL divergence of the steps, ``mean((m_S - m_T)^2) / (2 std^2)``, if they are
    stochastic (arXiv:2605.15055, eq. 11), and ``mean((m_S - m_T)^2) / 2`` if they are not (eq. 12). For
    ``output`` and ``data`` it is half the mean squared difference of the models' outputs or of the data that
    they predict. On a flow path the distance of the data is ``sigma^2``, and that of the means of
    deterministic steps ``dt^2`` times that of the outputs.

    Args:
        student: Carries gradients.
        teacher: At the same states.
        target: What is compared.
    """
    if target == "mean":
        std = student.gaussian.std
        if isinstance(std, float) and std > 0:
            return gaussian_kl(student.gaussian, teacher.gaussian)
        own, other = student.gaussian.mean, teacher.gaussian.mean
    elif target == "output":
        own, other = student.prediction.output, teacher.prediction.output
    else:
        own, other = student.prediction.x0, teacher.prediction.x0
    return (own.float() - other.detach().float()).square().flatten(1).mean(1) / 2


@dataclass(frozen=True, kw_only=True)
class DistillationLoss(Loss):
    """Matches a teacher's step at each state of the student's own trajectories.

    DiffusionOPD (arXiv:2605.15055); also Flow-OPD's closed form (arXiv:2605.08063, the mode ``gkd`` of its
    code, which leaves the step's length ``dt`` out of the variance: its loss of a step is ``dt`` times that
    of ``mean``). Belongs to the algorithm ``distillation``. Rewards, if there are any, are only measured.
    """

    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("teacher/distance", by_step="teacher_distance"),
    )

    kind: Literal["distillation"] = "distillation"
    teachers: tuple[Teacher, ...] = ()
    """The teachers, as tables ``[[loss.teachers]]``; each prompt has one of them."""
    task_key: str = "tag"
    """The key of a prompt's metadata by whose value a teacher with ``tags`` is chosen."""
    target: Target = "mean"
    """What is matched: the ``mean`` of the step (the papers), which weights a deterministic step by the
    square of its length; the model's ``output``, which weights all steps alike; or the predicted ``data``,
    which weights noisy states most."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the output of the model before training; 0 does not evaluate it.
    Flow-OPD's code has 0.04, for the KL of the steps without ``dt`` from an anchor of its own: it does not
    carry over."""

    @property
    def needs(self) -> LossNeeds:
        """Visited states and the teachers, and the reference for a KL."""
        return LossNeeds(
            action_kinds=("visited_state",),
            teachers=Teachers(self.teachers, self.task_key),
            reference=self.kl_coef > 0,
            # The KL of stochastic steps is divided by their variance, which nears 0 at the data.
            balanced_steps=self.target == "mean",
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The distance at each state."""
        assert inputs.teacher is not None
        loss = inputs.per_action(distance(inputs.policy, inputs.teacher, self.target))
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        apart = velocity_kl(inputs.policy, inputs.teacher).detach()
        return LossOutputs(loss, kl, {"teacher/distance": inputs.per_action(apart)})

    def check(self) -> None:
        """Raise ValueError if the teachers contradict each other, or a setting cannot train."""
        Teachers(self.teachers, self.task_key).check()
        require_at_least("kl_coef", self.kl_coef, 0.0)

    def warning(self, metrics: Mapping[str, float]) -> str:
        """A warning if the teachers equal the student, so that nothing is learned."""
        if metrics.get("teacher/distance", 1.0) > 0:
            return ""
        return (
            "the teachers' outputs equal the student's, so there is nothing to learn; check that the pipeline uses "
            "the guidance that loss.teachers sets"
        )
