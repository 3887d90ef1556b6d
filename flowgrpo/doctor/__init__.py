"""Proves on a pipeline that it can be trained: ``flowgrpo doctor MODEL``."""

from flowgrpo.doctor.examine import Diagnosis, examine, show
from flowgrpo.doctor.subject import PROMPTS, Check, Settings

__all__ = ["PROMPTS", "Check", "Diagnosis", "Settings", "examine", "show"]
