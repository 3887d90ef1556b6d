"""Proves on a pipeline that it can be trained: ``flowgrpo doctor MODEL``."""

from flowgrpo.doctor.checks import PROMPTS, Check, Settings
from flowgrpo.doctor.examine import Diagnosis, examine, show

__all__ = ["PROMPTS", "Check", "Diagnosis", "Settings", "examine", "show"]
