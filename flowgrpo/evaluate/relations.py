"""Where one box lies relative to another, by GenEval's rule (arXiv:2310.11513).

Boxes are ``(x0, y0, x1, y1)`` in pixels, x to the right and y downwards.
"""

from collections.abc import Sequence

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OVERLAP_TOLERANCE = 0.1
"""Share of the summed box sizes by which two centres must differ before a relation counts."""


def relations_between(box: Sequence[float], other: Sequence[float]) -> frozenset[str]:
    """The relations that hold for ``box`` with respect to ``other``; empty if the boxes coincide.

    A pair can satisfy two relations at once ("left of" and "above").
    """
    a = np.asarray(box, dtype=np.float64).reshape(2, 2)
    b = np.asarray(other, dtype=np.float64).reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(np.diff(a, axis=0))[0] + np.abs(np.diff(b, axis=0))[0]
    revised = np.maximum(np.abs(offset) - OVERLAP_TOLERANCE * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return frozenset()
    # GenEval divides by the length of the offset before it was reduced.
    dx, dy = revised / np.linalg.norm(offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, holds in found.items() if holds)
