"""Estimates the peak memory of a run before any weight is loaded.

A pipeline is built on the meta device from its config files, run once on fake tensors, and the bytes
of weights, optimizer and activations are added up. ``flowgrpo train --dry-run`` prints the result and
the settings to change if it exceeds the memory of a device.
"""

from flowgrpo.memory.budget import GB, Advice, Budget, Footprint, MemoryOptions, advise, budget
from flowgrpo.memory.footprint import estimate_footprint, memory_options
from flowgrpo.memory.meta_pipeline import EstimateError

__all__ = [
    "GB", "Advice", "Budget", "EstimateError", "Footprint", "MemoryOptions", "advise", "budget",
    "estimate_footprint", "memory_options",
]  # fmt: skip
