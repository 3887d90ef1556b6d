"""A reward with a gradient from the embedded model itself: how much the prompt helps to denoise an image.

A diffusion model is an implicit classifier (arXiv:2303.16203): the error with which it denoises an image is
lower with a caption that fits. The reward is that advantage over no caption, which an image can be changed
to raise. It reads prompts, but it is as short-sighted as the model: what the model takes for a red square
need not pass the verifier (``flowgrpo.shapes.rewards:Strict``), which has no gradient.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, CogView4Transformer2DModel
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, GlmModel

from flowgrpo.core.random import Random
from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes.architecture import CAPTION_TOKENS
from flowgrpo.shapes.world import IMAGE_SIZE

MODEL = Path(__file__).parent / "model"
TIMES = (0.35, 0.5, 0.65, 0.8)
"""Noise levels at which images are denoised. Below, captions make no difference; above, little of the
image is left."""


class DenoiserReward:
    """``1 - mean over times of mse(v(x_t, prompt) - u) / mse(v(x_t, no prompt) - u)``, below 1.

    0 if the prompt does not help; the model's own images have about 0.05. ``x_t = (1 - t) x0 + t eps`` with
    the image's latents ``x0`` and a fixed noise ``eps`` for each time, and ``u = eps - x0``. The weights are
    those in the package, whatever is trained.
    """

    def __init__(self, device: str = "cpu"):
        """
        Args:
            device: Where it computes.
        """
        self.device = torch.device(device)
        parts = (
            AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32),
            CogView4Transformer2DModel.from_pretrained(
                MODEL / "transformer", torch_dtype=torch.float32
            ),
            GlmModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32),
        )
        self._vae, self._denoiser, self._encoder = (
            p.to(self.device).eval().requires_grad_(False) for p in parts
        )
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
        self._captions: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        return self.scores_with_gradient(media, prompts).cpu()

    def scores_with_gradient(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The scores with the gradient of the images.

        Raises:
            ValueError: If the images do not have the size of the world.
        """
        if media.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"images of the embedded world have {IMAGE_SIZE}x{IMAGE_SIZE} pixels, got {tuple(media.shape)}"
            )
        config = self._vae.config
        encoded = self._vae.encode(2 * media.to(self.device) - 1).latent_dist.mode()
        x0 = (encoded - (config.shift_factor or 0.0)) * config.scaling_factor
        with_prompt = torch.cat([self._encoded(p.text) for p in prompts])
        without = self._encoded("").expand_as(with_prompt)
        gains = [self._gain(x0, t, with_prompt, without) for t in TIMES]
        return torch.stack(gains).mean(0)

    def _gain(
        self, x0: Tensor, t: float, with_prompt: Tensor, without: Tensor
    ) -> Float[Tensor, " batch"]:
        """The share by which the prompt lowers the error at one time."""
        generator = Random(0).generator("denoiser_reward", str(t))
        eps = torch.randn(x0.shape[1:], generator=generator).to(self.device).expand_as(x0)
        x = (1 - t) * x0 + t * eps
        size = torch.full((2 * len(x), 2), float(IMAGE_SIZE), device=self.device)
        velocity = self._denoiser(
            hidden_states=torch.cat([x, x]),
            encoder_hidden_states=torch.cat([with_prompt, without]),
            timestep=torch.full((2 * len(x),), 1000 * t, device=self.device),
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
        error = F.mse_loss(velocity, torch.cat([eps - x0, eps - x0]), reduction="none")
        helped, plain = error.flatten(1).mean(1).chunk(2)
        return 1 - helped / plain

    @torch.no_grad()
    def _encoded(self, text: str) -> Float[Tensor, "1 tokens width"]:
        """The embedding of a caption, as the pipeline makes it."""
        if text not in self._captions:
            ids = self._tokenizer(
                text, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids.to(self.device)  # fmt: skip
            self._captions[text] = self._encoder(ids, output_hidden_states=True).hidden_states[-2]
        return self._captions[text]
