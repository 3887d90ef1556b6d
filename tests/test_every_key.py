"""Every key of a loss, an advantage, a transition or a choice of steps changes something, or a note says that it does not.

The search is automatic: one key after the other gets another value. Results on fixed inputs must differ, or
the settings must be refused, or :func:`flowgrpo.config.without_effect.idle_notes` must name the key.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from flowgrpo.config import load
from flowgrpo.config.schema import Config
from flowgrpo.config.without_effect import idle_notes
from flowgrpo.core import advantages, steps, transitions
from flowgrpo.core.random import Random
from flowgrpo.core.scores import Scores
from flowgrpo.core.transitions import FlowSDE, Prediction, Step
from flowgrpo.losses.base import Loss, LossInputs, PolicyOutputs
from flowgrpo.losses.supervised import SupervisedLoss
from flowgrpo.losses.teachers import Teacher

STEP = Step.flow(0.8, 0.6)
OTHER: dict[str, Any] = {
    "clip_range": 9.0, "clip_high": 3e-3, "clip": 0.2, "chunks": (1, 2), "teachers": (Teacher(guidance_scale=9.0),),
    "reference_guidance": 2.0, "weights": (1.0, 2.0, 3.0, 1.0, 2.0, 3.0), "levels": (0.5, 0.4, 0.3), "epsilon": 0.3, "above": 0.4, "best": 2.0, "eta": 0.4,
    "noise_level": 0.4, "power": 0.5, "kl_coef": 0.5, "range": (0.1, 0.9), "betas": (0.8, 0.9), "first": 1, "last": 4,
    "start": 1, "size": 1,
}  # fmt: skip
"""Values of keys that are not just a number more."""
ALGORITHM = {
    "clipped": "flow_grpo", "nft": "diffusion_nft", "dmd": "dmd", "distillation": "distillation", "neighbor": "neighbor_grpo", "self_opd": "self_opd",
    "reward_gradient": "draft", "supervised": "pictures", "dpo": "pairs",
}  # fmt: skip
"""An algorithm of each loss; by default ``matching``."""


def kinds(union: Any) -> list[Any]:
    """One value of each kind of a union, with defaults."""
    return [k() for k in get_args(union) if is_dataclass(k) and all(_has_default(f) for f in fields(k))]  # fmt: skip


def _has_default(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def changed(one: Any) -> Iterator[tuple[str, Any]]:
    """The same settings with another value of each key; keys of tables in them by a dot."""
    hints = get_type_hints(type(one))
    for field in fields(one):
        name, value = field.name, getattr(one, field.name)
        if name == "kind":
            continue
        if is_dataclass(value):
            for inner, other in changed(value):
                yield f"{name}.{inner}", replace(one, **{name: other})
        elif get_origin(hints[name]) is Literal:
            for choice in get_args(hints[name]):
                if choice != value:
                    yield name, replace(one, **{name: choice})
        else:
            other = not value if isinstance(value, bool) else OTHER.get(name)
            if other is None or other == value:
                other = f"{value}x" if isinstance(value, str) else value + 1
            yield name, replace(one, **{name: other})


def numbers(found: Any) -> list[Any]:
    """All that a result contains, in a form that can be compared."""
    if isinstance(found, torch.Tensor):
        return [found.detach().tolist()]
    if is_dataclass(found):
        return [numbers(getattr(found, f.name)) for f in fields(found)]
    if isinstance(found, dict):
        return [(k, numbers(v)) for k, v in found.items()]
    return [repr(found)]


def outputs(seed: int, x: torch.Tensor, transition: Any) -> PolicyOutputs:
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    prediction = Prediction.from_output(x, output, STEP)
    return PolicyOutputs(prediction, transition(x, prediction, STEP))


def results(loss: Loss) -> list[Any]:
    """What a loss asks for, and what it makes of two groups of four actions."""
    needs, number = loss.needs, 8
    asked = [
        [v(n) for n in (1, 50, 1000)] if name == "old_policy" and v else repr(v)
        for name, v in vars(needs).items()
        if name not in ("step_weight", "fake_score")
    ]
    asked += [needs.step_weight and needs.step_weight(FlowSDE(), STEP), repr(needs.fake_score)]
    found: list[Any] = [asked, loss.kl_coef]
    draw = torch.Generator().manual_seed(0)
    x, x_next = (torch.randn(number, 6, generator=draw) for _ in range(2))
    transition = FlowSDE()
    own = outputs(1, x, transition)
    old, reference, teacher, average = (outputs(n, x, transition) for n in range(2, 6))
    log_prob = own.gaussian.log_prob(x_next)
    given: dict[str, Any] = {
        "old_mean": old.gaussian.mean if needs.old_mean else None,
        "old_policy": old if needs.old_policy else None,
        "average": average if needs.average else None,
        "reference": reference if needs.reference else None,
        "teacher": teacher if needs.teachers else None,
        "chunk_log_ratio": torch.linspace(-0.1, 0.1, number) if needs.chunks else None,
        "reward": own.prediction.output.mean(1) if needs.reward_gradient else None,
    }
    for direction in (None, torch.randn(number, 6, generator=draw)) if needs.fake_score else (None,):  # fmt: skip
        inputs = LossInputs(
            policy=own,
            x=x,
            state=torch.arange(number),
            x_next=x_next,
            old_log_prob=log_prob - torch.linspace(-0.002, 0.002, number),
            advantage=torch.tensor([1.0, -1.5, 0.0, 4.0, -7.0, 0.5, 0.0, 0.25]),
            group=torch.arange(number) // 4,
            sample=torch.arange(number) % 4,
            step=1,
            interval=STEP,
            transition=transition,
            first_update=False,
            direction=direction,
            **given,
        )
        made = loss(inputs)
        (gradient,) = torch.autograd.grad(
            made.loss.sum(), own.prediction.output, allow_unused=True, retain_graph=True
        )
        found += [numbers(made), numbers(gradient)]
    return found


def is_noted(loss: Loss, key: str) -> bool:
    """Whether a note names a key of a loss in a run with an algorithm of it."""
    algorithm = ALGORITHM.get(loss.kind, "matching")  # type: ignore[attr-defined]
    config = replace(load("quickstart_flow_grpo", [f"algorithm={{kind='{algorithm}'}}"]), loss=loss)
    return any(n.startswith(f"loss.{key} = ") for n in idle_notes(config))


def is_refused(check: Callable[[], Any]) -> bool:
    try:
        check()
    except ValueError:
        return True
    return False


LOSSES = kinds(get_type_hints(Config)["loss"])


def silent_keys(loss: Any) -> list[str]:
    """The keys of a loss that change nothing, and that no check and no note names."""
    if hasattr(loss, "teachers"):
        loss = replace(loss, teachers=(Teacher(guidance_scale=3.0),))
    before = results(loss)
    assert before == results(loss)
    return [
        key
        for key, other in changed(loss)
        if not is_refused(other.check) and results(other) == before and not is_noted(other, key)
    ]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda one: one.kind)
def test_every_key_of_a_loss(loss: Any) -> None:
    assert silent_keys(loss) == []


def credit(advantage: Any) -> list[Any]:
    """Advantages of 12 candidates in three groups, with three rewards."""
    draw = torch.Generator().manual_seed(0)
    first, second = (3 * torch.rand(12, generator=draw).double() for _ in range(2))
    if advantage.is_binary:
        scores = Scores({}, (first > 1.5).double())
        return numbers(advantages.candidate_advantages(advantage, scores, torch.arange(12) // 4))
    # Rewards that vary by different shares of their size.
    first, second = (first / 6, second / 6) if advantage.adds_best else (first, second + 5)
    weights = {"first": 1.0, "second": 0.5, "third": 0.1}
    raw = {"first": first, "second": second, "third": 0.2 * first.square()}
    scores = Scores(raw, sum(w * raw[k] for k, w in weights.items()), weights)
    groups = torch.arange(12) // 4
    return numbers(advantages.candidate_advantages(advantage, scores, groups))


@pytest.mark.parametrize("advantage", kinds(advantages.Advantage), ids=lambda one: one.kind)
def test_every_key_of_an_advantage(advantage: Any) -> None:
    before = credit(advantage)
    config = load("quickstart_flow_grpo")

    def noted(other: Any, key: str) -> bool:
        made = replace(config, algorithm=replace(config.algorithm, advantage=other))
        return any(n.startswith(f"algorithm.advantage.{key} = ") for n in idle_notes(made))

    silent = [k for k, other in changed(advantage) if credit(other) == before and not noted(other, k)]  # fmt: skip
    assert silent == []


@pytest.mark.parametrize("transition", [t for t in kinds(transitions.Transition) if t.kind != "ode"], ids=lambda one: one.kind)  # fmt: skip
def test_every_key_of_a_transition(transition: Any) -> None:
    if transition.kind == "calibrated_sde":
        transition = replace(transition, levels=(0.3, 0.3, 0.3))
    draw = torch.Generator().manual_seed(0)
    x, output, x_next = (torch.randn(2, 6, generator=draw) for _ in range(3))
    step = replace(STEP, index=1)
    if transition.kind == "ddim":
        step = replace(Step.diffusion(0.6, 0.8), index=1)

    def result(one: Any) -> list[Any]:
        found = one(x, Prediction.from_output(x, output, step), step)
        return [*numbers(found.mean), float(found.std), *numbers(found.log_prob(x_next))]

    before = result(transition)
    assert [k for k, other in changed(transition) if result(other) == before] == []


@pytest.mark.parametrize("selection", kinds(steps.StepSelection), ids=lambda one: one.kind)
def test_every_key_of_a_choice_of_steps(selection: Any) -> None:
    config = load("quickstart_flow_grpo")

    def result(one: Any) -> list[list[int]]:
        return [one.select(20, i, Random(0).at(i)) for i in range(0, 600, 7)]

    def noted(other: Any, key: str) -> bool:
        made = replace(config, algorithm=replace(config.algorithm, steps=other))
        return any(n.startswith(f"algorithm.steps.{key} = ") for n in idle_notes(made))

    before = result(selection)
    silent = [k for k, other in changed(selection) if result(other) == before and not noted(other, k)]  # fmt: skip
    assert silent == []


@dataclass(frozen=True, kw_only=True)
class WithSpare(SupervisedLoss):
    """A loss with a key that nothing reads."""

    spare: float = 0.0


def test_the_search_finds_a_key_without_effect() -> None:
    assert silent_keys(WithSpare()) == ["spare"]
