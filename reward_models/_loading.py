"""What the rewards share: precision and device, checkpoints that must fit, pictures of 8 bits."""

import math
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from flowgrpo.data.pictures import OVERSHOOT, as_rgb
from flowgrpo.data.prompts import Prompt

Precision = Literal["float32", "float16", "bfloat16"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, which BLIP, Qwen-VL and the preference models took over."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pick_device(device: str) -> str:
    """``auto`` takes a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def pick_dtype(dtype: str) -> torch.dtype:
    """
    Raises:
        ValueError: If the name is none of the three precisions.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return getattr(torch, dtype)


# Pictures.
def check_media(media: Tensor, prompts: Sequence[Prompt], video: bool = False) -> None:
    """Refuse what cannot be meant. NaN pixels pass: their image has no score, the others have one.

    Raises:
        ValueError: If the shape, the type or the range is wrong.
    """
    layout, ndim = ("(B, F, 3, H, W)", 5) if video else ("(B, 3, H, W)", 4)
    if media.ndim != ndim or media.shape[-3] != 3 or not media.is_floating_point():
        raise ValueError(
            f"{'videos' if video else 'images'} must be floating-point {layout}, "
            f"got {media.dtype} {tuple(media.shape)}"
        )
    if media.shape[0] != len(prompts):
        raise ValueError(f"{media.shape[0]} media for {len(prompts)} prompts")
    if 0 in media.shape[1:]:
        raise ValueError(f"media of size zero: {tuple(media.shape)}")
    low, high = media.nan_to_num(0.5, 0.5, 0.5).aminmax()
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(f"media must be in [0, 1], got {low.item():.4g} to {high.item():.4g}")


def eight_bits(media: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    """As a saved picture holds it, so that training and files score alike; NaN becomes black."""
    return (media.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)


def finite_only(
    scores: Float[Tensor, " batch"], media: Float[Tensor, "batch *any"]
) -> Float[Tensor, " batch"]:
    """The scores in fp32 on the CPU, NaN where a picture holds NaN or infinity."""
    return scores.float().cpu().where(media.isfinite().flatten(1).all(1).cpu(), math.nan)


def pictures(media: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """The images as PIL has them when read from a file."""
    return [Image.fromarray(p) for p in eight_bits(media).permute(0, 2, 3, 1).cpu().numpy()]


def luma(frames: UInt8[Tensor, "*any 3 h w"]) -> Float[Tensor, "*any h w"]:
    """Brightness in [0, 1], by the weights of ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    return (frames.float() / 255 * weights[:, None, None]).sum(-3)


def shrunk_and_cropped(
    images: Iterable[Image.Image],
    shortest: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    odd: Literal["round", "floor"] = "round",
) -> Float[Tensor, "batch 3 crop crop"]:
    """CLIP's preprocessing: shorter side by Pillow's bicubic filter, centre crop, normalised.

    ``odd`` says where the crop begins if the margin is odd: torchvision rounds half of it, the
    processors of transformers round down, which moves some crops by a pixel.
    """
    tensors = []
    for image in images:
        resized = TF.resize(image, [shortest], TF.InterpolationMode.BICUBIC)
        margins = (resized.height - crop, resized.width - crop)
        top, left = (round(m / 2) if odd == "round" else m // 2 for m in margins)
        tensors.append(TF.to_tensor(TF.crop(resized, top, left, crop, crop)))
    return TF.normalize(torch.stack(tensors), list(mean), list(std))


def reference_paths(prompt: Prompt, key: str, root: Path) -> list[Path]:
    """The reference images of a prompt.

    Raises:
        ValueError: If it names none.
    """
    named = prompt.metadata.get(key)
    paths = [named] if isinstance(named, str) else named
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"prompt {prompt.text!r} needs metadata {key!r}, the path of a reference image or a "
            f"list of them; it has {named!r}"
        )
    return [root / path for path in paths]


def check_references(prompts: Sequence[Prompt], key: str, root: Path) -> None:
    """
    Raises:
        ValueError: If a prompt names no reference, or one that is no file.
    """
    for prompt in prompts:
        for path in reference_paths(prompt, key, root):
            if not path.is_file():
                raise ValueError(f"reference {str(path)!r} of prompt {prompt.text!r} is no file")


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, turned upright, transparency on white.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has more than 8 bits per value.
    """
    with Image.open(path) as image:
        return as_rgb(image)


# Checkpoints.
def find_file(model: str, names: Sequence[str]) -> Path:
    """A checkpoint: the file ``model``, or one of ``names`` in that folder, or on the hub.

    Raises:
        ValueError: If there is no such file or folder and it is no hub id, or the folder has none.
        OSError: If the hub has no such file.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"folder {model!r} holds none of {', '.join(names)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"{model!r} is no file, no folder and no hub id")
    return Path(hf_hub_download(model, names[0]))


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a file of safetensors or of torch, unwrapped; nothing in it is executed.

    Raises:
        ValueError: If the file holds anything but weights.
    """
    state: Any = (
        load_file(path)
        if path.suffix == ".safetensors"
        else torch.load(path, map_location="cpu", weights_only=True)
    )
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path.name} holds no state dict")
    return dict(state)


def refuse(
    source: str, what: str, missing: Collection[str], left_over: Collection[str] = ()
) -> None:
    """
    Raises:
        ValueError: If weights are missing or left over.
    """
    for how, keys in (("missing", missing), ("left over", left_over)):
        if keys:
            raise ValueError(
                f"{source!r} is no {what}: {len(keys)} weights are {how}, such as {min(keys)}"
            )


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str, what: str) -> None:
    """Load weights of which none may be missing, left over or of another shape.

    Raises:
        ValueError: If they do not fit.
    """
    wanted = module.state_dict()
    refuse(source, what, wanted.keys() - state.keys(), state.keys() - wanted.keys())
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{source!r} is no {what}: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(state)


def numbered(shapes: Mapping[int, Sequence[int]]) -> nn.Sequential:
    """Linear layers of weights of these shapes, under the numbers they had between dropouts."""
    layers = {str(n): nn.Linear(inputs, outputs) for n, (outputs, inputs) in shapes.items()}
    return nn.Sequential(OrderedDict(layers))


def from_pretrained(
    kind: type, model: str, what: str, dtype: torch.dtype, parts: Sequence[str] = (), **options: Any
) -> Any:
    """A model of transformers, if every weight in it comes from the checkpoint.

    Args:
        kind: The class.
        model: Hub id or folder.
        what: What it should be, for the message.
        dtype: Precision.
        parts: Beginnings of names that the checkpoint may hold beside the weights of ``kind``.
        options: More for ``from_pretrained``.

    Raises:
        ValueError: If weights are missing or left over.
        RuntimeError: If weights are of another shape than the configuration says.
        OSError: If there is no such model.
    """
    loaded, info = kind.from_pretrained(  # type: ignore[attr-defined]
        model, dtype=dtype, output_loading_info=True, **options
    )
    # Old checkpoints hold position tables too, which are computed nowadays: no weights.
    tables = {name.rsplit(".", 1)[-1] for name, _ in loaded.named_buffers()}
    left_over = {
        k
        for k in info["unexpected_keys"]
        if k.rsplit(".", 1)[-1] not in tables and not k.startswith(tuple(parts))
    }
    refuse(model, what, info["missing_keys"], left_over)
    return loaded.eval().requires_grad_(False)


def template(name: str) -> str:
    """A text that a model was trained to be asked with; ``{prompt}`` stands for the caption."""
    path = Path(__file__).parent / "templates" / f"{name}.txt"
    return path.read_text(encoding="utf-8")
