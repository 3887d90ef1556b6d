"""Samplers by name: the deterministic solvers, and the transitions with their strength."""

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


@dataclass(frozen=True)
class Sampler:
    """How the steps of a call are taken.

    Attributes:
        solver: Solver of the deterministic steps.
        transition: The stochastic step; None for a deterministic sampler.
    """

    solver: PlainSolver
    transition: Transition | None

    @classmethod
    def parse(cls, text: str) -> "Sampler":
        """Read ``NAME`` or ``NAME:STRENGTH``, such as ``ode``, ``dpm_2m``, ``cps`` or ``flow_sde:0.5``.

        The strength is the ``noise_level`` of a transition, or the ``eta`` of ``ddim``.

        Raises:
            ValueError: If the name is unknown or the strength is wrong.
        """
        name, colon, strength = text.partition(":")
        if name in DETERMINISTIC:
            if colon:
                raise ValueError(f"sampler {text!r}: {name} is deterministic and has no strength")
            return cls(DETERMINISTIC[name], None)
        if name not in STOCHASTIC:
            raise ValueError(
                f"sampler {text!r}: expected one of {', '.join(NAMES)}, the last {len(STOCHASTIC)} of them "
                f"also with a strength, such as cps:0.5{suggest(name, NAMES)}"
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

    def stochastic(self, num_steps: int) -> range:
        """The stochastic steps of a call: all but the last, which ends at data without noise."""
        return range(num_steps - 1 if self.transition is not None else 0)
