"""Tiny pipeline folders of the real diffusers and transformers classes, made without a download."""

from pathlib import Path

from .image import IMAGE
from .image_lm import IMAGE_LM
from .parts import Family
from .sound import SOUND
from .video import VIDEO

__all__ = ["FAMILIES", "Family", "save"]

FAMILIES: dict[str, Family] = {f.name: f for f in (*IMAGE, *IMAGE_LM, *VIDEO, *SOUND)}


def save(name: str, folder: str | Path) -> Path:
    """Build a family and save it, for ``DiffusionPipeline.from_pretrained(folder)``."""
    folder = Path(folder)
    FAMILIES[name].build().save_pretrained(folder)
    return folder
