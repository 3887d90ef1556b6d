"""CLIPScore: cosine similarity of the CLIP embeddings of image and prompt (arXiv:2104.08718)."""

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, pick_device, pick_dtype
from reward_models.shared.pictures import check_media, finite_only, pictures

__all__ = ["CLIPScore"]


class CLIPScore:
    """Cosine of image and text embedding, in [-1, 1]; usually 0.15 to 0.35.

    The default is OpenAI's ViT-L/14 (MIT, 224x224, bicubic resize and centre crop). Prompts are cut
    after 77 tokens. About 1.7 GB in fp32.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Architecture name of open_clip, or ``hf-hub:...`` / ``local-dir:...``.
            pretrained: Weights of that architecture: a tag of open_clip or a file.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If open_clip does not know the model or the weights.
            RuntimeError: If weights are missing or left over.
        """
        self.dtype, self.device = pick_dtype(dtype), pick_device(device)
        own_weights = ":" in model
        if not own_weights:
            known = open_clip.list_pretrained_tags_by_model(model)
            if model not in open_clip.list_models():
                raise ValueError(f"open_clip has no model {model!r}; see open_clip.list_models()")
            if pretrained not in known and not Path(pretrained).is_file():
                raise ValueError(
                    f"no weights {pretrained!r} for {model}: neither a file nor one of {', '.join(known)}"
                )
        # OpenAI's weights were trained with another activation than the architecture's name says.
        quick = not own_weights and bool(
            (open_clip.get_pretrained_cfg(model, pretrained) or {}).get("quick_gelu")
        )
        # This function refuses a model without weights; open_clip's others draw them at random.
        self.model, self._preprocess = open_clip.create_model_from_pretrained(
            model,
            pretrained=None if own_weights else pretrained,
            force_quick_gelu=quick,
        )
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)

    def preprocess(self, media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        """The input of the model: open_clip's own transform of the images, rounded to 8 bits."""
        return torch.stack([self._preprocess(image) for image in pictures(media)])

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        pixels = self.preprocess(media).to(self.device, self.dtype)
        tokens = self.tokenizer([p.text for p in prompts]).to(self.device)
        image = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        text = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        return finite_only((image * text).sum(-1), media)
