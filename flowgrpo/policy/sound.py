"""The sound that a pipeline returns along with its videos (LTX-2)."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from flowgrpo.data.audio import Audio


def audio_rate(pipeline: DiffusionPipeline) -> int | None:
    """Amplitudes per second of the sound that a pipeline makes; None if it makes none.

    A vocoder turns spectrograms into sound. LTX-2's has the rate in its configuration, Kandinsky 6's
    pipeline as an attribute.
    """
    vocoder = getattr(pipeline, "vocoder", None)
    if vocoder is None:
        return None
    own = getattr(pipeline, "audio_sample_rate", None)
    rate = getattr(vocoder.config, "output_sampling_rate", None) or own
    return None if rate is None else int(rate)


def as_audio(output: Any, pipeline: DiffusionPipeline) -> Audio | None:
    """The sound in the output of a pipeline's call that decodes: the second value, after the videos.

    Sound without an axis of channels has one channel.
    """
    rate = audio_rate(pipeline)
    if rate is None or not isinstance(output, tuple) or len(output) < 2:
        return None
    sound = output[1]
    if not isinstance(sound, Tensor) or sound.ndim not in (2, 3):
        return None
    waveform = sound.detach().float().cpu()
    return Audio(waveform.unsqueeze(1) if waveform.ndim == 2 else waveform, rate)
