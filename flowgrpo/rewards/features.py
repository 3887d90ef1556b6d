"""Features of candidates: a vector for each image, by which the samples of a group are compared."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from flowgrpo.core.guards import thumbnail
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.rewards.loading import construct
from flowgrpo.rewards.settings import Reward


@runtime_checkable
class FeatureModel(Protocol):
    """Maps images to vectors whose directions are compared, such as the class tokens of DINO."""

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images size"]:
        """One vector per image, of any length."""
        ...


class Features:
    """Computes the features of media.

    Args:
        model: A name in ``reward_models`` or an import path; if empty, features are thumbnails of 8x8
            pixels with values in [-1, 1].
        options: Arguments for its class.

    Raises:
        ValueError: If there is no such model, or it has no features.
    """

    def __init__(self, model: str = "", options: Mapping[str, Any] | None = None):
        self.model: FeatureModel | None = None
        if model:
            loaded: object = construct(Reward(model=model, options=dict(options or {})))
            if not isinstance(loaded, FeatureModel):
                raise ValueError(
                    f"guard.features: {model!r} has no method embed(images); use 'dino' or 'siglip', or a class of "
                    "your own that has it"
                )
            self.model = loaded

    def __call__(
        self, media: Float[Tensor, "batch *frames channels height width"]
    ) -> Float[Tensor, "batch size"]:
        """The features of each image, or of each video's middle frame, on the CPU in fp32.

        NaN for images with NaN.
        """
        images = media[:, media.shape[1] // 2] if media.ndim == 5 else media
        if self.model is None:
            return (2 * thumbnail(images.float()) - 1).cpu()
        eight = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        pictures = [Image.fromarray(p) for p in eight.permute(0, 2, 3, 1).cpu().numpy()]
        found = self.model.embed(pictures).float().cpu()
        finite = images.flatten(1).isfinite().all(1).cpu()
        return found.where(finite[:, None], torch.nan)
