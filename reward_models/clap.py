"""CLAP: similarity of a video's sound to a text (arXiv:2211.06687)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.signal import resample_poly
from torch import Tensor
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

from flowgrpo.data.audio import Audio
from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype

__all__ = ["CLAPScore"]
WEIGHTS = ("model",)


class CLAPScore:
    """Cosine of the embeddings of a video's sound and of a text, in [-1, 1].

    For pipelines that make sound (LTX-2). The picture is not looked at. The text is the prompt, or the
    metadata that ``key`` names, such as a description of the sound alone: CLAP was trained on captions
    of sounds ("a dog barks"), and prompts for videos describe mostly what is seen.

    The default is ``laion/clap-htsat-unfused`` (Apache-2.0). Channels are averaged, and the sound is
    resampled to the model's rate (48 kHz) and rounded to 16 bits, as its authors do. The model hears
    10 seconds: shorter sound is repeated by its feature extractor, and longer sound is scored in
    windows of equal distance that cover it, whose cosines are averaged, where the authors choose one
    at random. It was not tested with the published weights, which were not available.

    Sound with NaN scores NaN.
    """

    takes_audio: Literal[True] = True

    def __init__(
        self,
        model: str = "laion/clap-htsat-unfused",
        key: str = "",
        batch_size: int = 32,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``ClapModel`` with its feature extractor and its tokenizer.
            key: Metadata key of the text; empty for the prompt.
            batch_size: Windows in one forward pass.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.key, self.batch_size = key, batch_size
        self.model: ClapModel = from_pretrained(
            ClapModel, model, "CLAP model", pick_dtype(dtype)
        ).to(pick_device(device))
        self.extractor = ClapFeatureExtractor.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_tokens = self.model.config.text_config.max_position_embeddings - 2

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have the text; called before training starts.

        Raises:
            ValueError: If one has none.
        """
        for prompt in prompts:
            self._text(prompt)

    @torch.no_grad()
    def __call__(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio
    ) -> Float[Tensor, " batch"]:
        waveform = audio.waveform
        if waveform.ndim != 3 or len(waveform) != len(prompts) or 0 in waveform.shape:
            raise ValueError(
                f"sound must be (B, channels, time), with {len(prompts)} samples and none of size zero, "
                f"got {tuple(waveform.shape)}"
            )
        windows = [self._windows(sample, audio.rate) for sample in waveform.float().cpu()]
        heard = self._embed([w for own in windows for w in own]).split(
            [len(own) for own in windows]
        )
        texts = self._embed_texts([self._text(p) for p in prompts])
        cosines = [(own @ text).mean() for own, text in zip(heard, texts, strict=True)]
        return torch.stack(cosines).cpu().where(audio.is_finite, math.nan)

    def _text(self, prompt: Prompt) -> str:
        text = prompt.metadata.get(self.key) if self.key else prompt.text
        if not isinstance(text, str) or not text.strip():
            what = f"no text under metadata[{self.key!r}]" if self.key else "no text"
            raise ValueError(
                f"prompt {prompt.text!r} has {what} that its sound can be compared with"
            )
        return text

    def _windows(self, sample: Float[Tensor, "channels time"], rate: int) -> list[np.ndarray]:
        """Mono windows of at most the model's length, at its rate and of 16 bits."""
        mono = sample.mean(0).nan_to_num().double().numpy()
        to = self.extractor.sampling_rate
        if rate != to:
            common = math.gcd(rate, to)
            mono = resample_poly(mono, to // common, rate // common)
        mono = np.round(mono.clip(-1, 1) * 32767) / 32767
        longest = self.extractor.nb_max_samples
        number = math.ceil(len(mono) / longest)
        starts = np.linspace(0, max(0, len(mono) - longest), number).round().astype(int)
        return [mono[s : s + longest] for s in starts]

    def _embed(self, windows: Sequence[np.ndarray]) -> Float[Tensor, "windows width"]:
        """Embeddings of sound, of length 1, in fp32."""
        found = []
        for start in range(0, len(windows), self.batch_size):
            part = list(windows[start : start + self.batch_size])
            seen = self.extractor(
                part, sampling_rate=self.extractor.sampling_rate, return_tensors="pt"
            )
            features = seen["input_features"].to(self.model.device, self.model.dtype)
            # No window is longer than the model's. The extractor calls a random one longer.
            longer = torch.zeros(len(part), 1, dtype=torch.bool, device=features.device)
            output: Any = self.model.get_audio_features(features, is_longer=longer)
            found.append(output.pooler_output.float())
        return torch.cat(found)

    def _embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """Embeddings of texts, of length 1, in fp32; texts are cut after the model's tokens."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        output: Any = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return output.pooler_output.float()
