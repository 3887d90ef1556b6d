"""A reward learned from votes: a linear head over frozen features (Bradley-Terry)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.frozen_features import FrozenFeatures, probe
from reward_models.shared.pictures import check_media, finite_only, pictures

__all__ = ["VoteHead"]
PATHS = ("file",)

KIND, FORMAT = "flowgrpo-vote-head", 1
TOLERANCE = 0.02
"""Largest relative difference of the probe's features, by rounding on other devices."""


class VoteHead:
    """The score of a picture by the votes of people, as ``flowgrpo learn-reward`` fits it.

    ``w . (features - mean)``, the logarithm of the odds with which voters prefer the picture to an average
    one of those that they saw; the difference of two scores is the log odds of the one against the other.
    It ignores the prompt: the head knows which pictures people prefer, not whether they match. Train on it
    together with a reward that reads prompts.

    The file holds numbers only. It names its features, which must be one of those that ship with flowgrpo;
    nothing in it is executed. Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    ignores_prompt = True

    def __init__(self, file: str, options: Mapping[str, Any] | None = None):
        """
        Args:
            file: The safetensors file that ``flowgrpo learn-reward`` wrote.
            options: Options of the features that replace those in the file, such as a folder of the model
                or a device.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no head, is damaged or of a newer version, or if the features are not
                those that it was fitted on.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"no head {file}: 'flowgrpo learn-reward VOTES' makes one")
        try:
            with safe_open(file, "pt") as opened:
                notes = opened.metadata() or {}
                tensors = {k: opened.get_tensor(k).float() for k in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file that can be read: {error}") from error
        if notes.get("kind") != KIND:
            raise ValueError(f"{file} is no head of votes: 'flowgrpo learn-reward VOTES' makes one")
        try:
            version = int(notes["format"])
            if version > FORMAT:
                raise ValueError(
                    f"{file} was written by a newer version of flowgrpo: update flowgrpo"
                )
            self.weight, self.mean, known = (tensors[k] for k in ("weight", "mean", "probe"))
            name, recorded = notes["features"], dict(json.loads(notes["options"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): fit it again") from error
        self.features = FrozenFeatures(name, {**recorded, **(options or {})})
        found = self.features([probe()])[0]
        if found.shape != self.weight.shape or found.shape != self.mean.shape:
            raise ValueError(
                f"{file} was fitted on {len(self.weight)} features, and {name!r} has {len(found)}: give the "
                "model that it was fitted on in options"
            )
        if float((found - known).norm()) > TOLERANCE * float(known.norm()):
            raise ValueError(
                f"{file} was fitted on other weights of {name!r}: give the model that it was fitted on in options"
            )

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        features = self.features(pictures(media))
        return finite_only((features - self.mean) @ self.weight, media)
