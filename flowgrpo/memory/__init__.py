"""How much memory a run will take, found out before any weight is loaded."""

from flowgrpo.memory.blueprint import NoEstimate
from flowgrpo.memory.budget import GB, Advice, Budget, Choice, Measured, advise, budget
from flowgrpo.memory.measure import choice_of, measure

__all__ = [
    "GB", "Advice", "Budget", "Choice", "Measured", "NoEstimate", "advise", "budget", "choice_of",
    "measure",
]  # fmt: skip
