"""Checks on a pipeline that it can be trained: ``flowgrpo doctor MODEL``.

The doctor loads a pipeline, finds arguments with which it can be called, and measures that rollout,
replay, gradients, branching, decoding and export work on it; every check compares a number with a
tolerance.
"""

from flowgrpo.doctor.examine import Diagnosis, examine, show
from flowgrpo.doctor.subject import PROMPTS, Check, Settings

__all__ = ["PROMPTS", "Check", "Diagnosis", "Settings", "examine", "show"]
