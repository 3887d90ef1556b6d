"""Samplers by name: the deterministic solvers, the transitions with their strength, and schedulers of diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from flowgrpo.core.imports import suggest
from flowgrpo.core.solvers import PlainSolver
from flowgrpo.core.transitions import CPS, DDIM, DanceSDE, FlowSDE, Transition

DETERMINISTIC: Mapping[str, PlainSolver] = {
    "ode": "euler",
    **{s: s for s in get_args(PlainSolver) if s != "euler"},
}
"""Solvers by the name of their sampler; ``ode`` is the deterministic sampler of evaluations."""
STOCHASTIC = {t.kind: t for t in (FlowSDE, DanceSDE, CPS, DDIM)}
"""Transitions by their kind."""
NAMES = (*DETERMINISTIC, *STOCHASTIC)
SHIPPED = "shipped"
"""The scheduler that the pipeline came with."""


@dataclass(frozen=True)
class Sampler:
    """How the steps of a call are taken.

    Attributes:
        solver: Solver of the deterministic steps.
        transition: The stochastic step; None for a deterministic sampler.
        scheduler: Class of a scheduler of diffusers that samples instead, or ``shipped`` for the one that
            the pipeline came with; empty for flowgrpo's own.
    """

    solver: PlainSolver
    transition: Transition | None
    scheduler: str = ""

    @classmethod
    def parse(cls, text: str) -> "Sampler":
        """Read ``NAME`` or ``NAME:STRENGTH``, such as ``ode``, ``dpm_2m``, ``cps`` or ``flow_sde:0.5``.

        The strength is the ``noise_level`` of a transition, or the ``eta`` of ``ddim``. A class of
        diffusers, such as ``UniPCMultistepScheduler``, or ``shipped`` is another scheduler; whether it
        fits a model is known once the model is loaded.

        Raises:
            ValueError: If the name is unknown or the strength is wrong.
        """
        name, colon, strength = text.partition(":")
        if name in DETERMINISTIC:
            if colon:
                raise ValueError(f"sampler {text!r}: {name} is deterministic and has no strength")
            return cls(DETERMINISTIC[name], None)
        if name == SHIPPED or name.endswith("Scheduler"):
            return cls._of_diffusers(text)
        if name not in STOCHASTIC:
            raise ValueError(
                f"sampler {text!r}: expected one of {', '.join(NAMES)}, the last {len(STOCHASTIC)} of them "
                "also with a strength, such as cps:0.5; 'shipped', the pipeline's own scheduler; or another of "
                f"diffusers' schedulers by its class, such as UniPCMultistepScheduler{suggest(name, NAMES)}"
            )
        kind = STOCHASTIC[name]
        if not colon:
            return cls("euler", kind())
        try:
            value = float(strength)
        except ValueError:
            value = -1.0
        # On the angle of CPS and the share of DDIM, 1 is all of the noise.
        highest = 1.0 if kind in (CPS, DDIM) else 10.0
        if not 0 < value <= highest:
            raise ValueError(
                f"sampler {text!r}: the strength must be above 0 and at most {highest:g}"
            )
        strength_of: dict[str, Any] = {"eta" if kind is DDIM else "noise_level": value}
        return cls("euler", kind(**strength_of))

    @classmethod
    def _of_diffusers(cls, text: str) -> "Sampler":
        """A scheduler of diffusers by the name of its class.

        Raises:
            ValueError: If diffusers has no such class.
        """
        if ":" in text:
            raise ValueError(f"sampler {text!r}: a scheduler of diffusers has no strength")
        if text != SHIPPED:
            import diffusers

            known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
            if text not in known:
                raise ValueError(
                    f"sampler {text!r}: diffusers {diffusers.__version__} has no such scheduler{suggest(text, known)}"
                )
        return cls("euler", None, text)

    def stochastic(self, num_steps: int) -> range:
        """The stochastic steps of a call: all but the last, which ends at data without noise."""
        return range(num_steps - 1 if self.transition is not None else 0)
