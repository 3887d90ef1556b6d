"""Reward models with random weights, in folders of the published layouts, for benchmarks and tests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from reward_models.hpsv2 import HPSv2
from tests import zoo
from tests.tiny.parts import clip_tokenizer

PRECISIONS = ("float32", "bfloat16")
SIZE = 256
"""Height and width of the images in pixels."""


class TinyHPSv2(HPSv2):
    """HPS v2.1 with a tiny architecture, which it registers with open_clip first."""

    def __init__(self, model: str, **options: Any):
        open_clip.add_model_config(Path(model))
        super().__init__(model, architecture=zoo.TINY_HPS, **options)


@dataclass(frozen=True)
class Case:
    """One reward to measure.

    Attributes:
        model: Name of the reward, as in a configuration.
        options: Arguments of its class.
        number: Images or videos per batch.
        video: Whether the media are videos.
        precisions: Precisions to measure; none for rewards without a model.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    number: int = 16
    video: bool = False
    precisions: Sequence[str] = PRECISIONS


Make = Callable[[Path], Case]


# Tiny models, which the tests use too.
def tiny_pick_score(folder: Path) -> Case:
    """A CLIP model with its processor."""
    zoo.save_clip(folder)
    return Case("pick_score", {"model": str(folder), "processor": clip_processor(folder, 32)})


def clip_processor(folder: Path, side: int) -> str:
    """CLIP's processor for a folder."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    CLIPProcessor(images, clip_tokenizer()).save_pretrained(folder)
    return str(folder)


def tiny_hpsv2(folder: Path) -> Case:
    """HPS v2.1."""
    with zoo.hps_folder(folder):
        return Case("benchmarks.reward_cases:TinyHPSv2", {"model": str(folder)})


def tiny_subject_identity(folder: Path) -> Case:
    """DINOv2 and OWLv2."""
    for part, save in (("dino", zoo.save_dino), ("owl", zoo.save_owlv2)):
        (folder / part).mkdir()
        save(folder / part)
    models = {"model": str(folder / "dino"), "detector": str(folder / "owl"), "threshold": 0.5}
    return Case("subject_identity", models | {"root": with_reference(folder)}, 4)


def tiny_geneval(folder: Path) -> Case:
    """A detector, whose input has 800x800 pixels at any size of the model, and a CLIP for colours."""
    for part in ("detector", "clip"):
        (folder / part).mkdir()
    detector = str(zoo.save_mask2former(folder / "detector"))
    clip = f"local-dir:{zoo.save_open_clip(folder / 'clip')}"
    return Case("geneval", {"detector": detector, "color_model": clip}, 4)


def with_reference(folder: Path) -> str:
    """The folder with a reference image."""
    zoo.pil(zoo.noise(1, SIZE, SIZE))[0].save(folder / "reference.png")
    return str(folder)


def tiny_hpsv3(folder: Path) -> Case:
    """A Qwen2-VL with a head."""
    base = zoo.save_qwen2_vl(folder / "base")
    save_file(zoo.hpsv3_state(base), folder / "HPSv3.safetensors")
    return Case("hpsv3", {"model": str(folder), "base": str(base)}, 8)


def tiny_video_align(folder: Path) -> Case:
    """A Qwen2-VL with LoRAs and a head."""
    base = zoo.save_qwen2_vl(folder / "base")
    torch.save(zoo.video_align_state(base), folder / "model.pth")
    return Case("video_align", {"model": str(folder), "base": str(base)}, 4, video=True)


def answering(name: str, video: bool) -> Make:
    """A Qwen2.5-VL that generates 16 random tokens: only the time is meaningful, there is no score."""

    def make(folder: Path) -> Case:
        model = str(zoo.save_qwen25_vl(folder, []))
        return Case(name, {"model": model, "max_new_tokens": 16}, 4, video)

    return make


def frames(folder: Path) -> Case:
    """CLIPScore over the frames of videos."""
    inner = {"model": f"local-dir:{zoo.save_open_clip(folder)}"}
    options = {"model": "clip_score", "options": inner}
    return Case("flowgrpo.rewards.frames:FrameScore", options, 4, video=True, precisions=())


TINY: Mapping[str, Make] = {
    "clip_score": lambda f: Case("clip_score", {"model": f"local-dir:{zoo.save_open_clip(f)}"}),
    "pick_score": tiny_pick_score,
    "hpsv2": tiny_hpsv2,
    "hpsv3": tiny_hpsv3,
    "image_reward": lambda f: Case(
        "image_reward", {"model": str(zoo.save_image_reward(f)), "tokenizer": str(f)}
    ),
    "aesthetic": lambda f: Case("aesthetic", {"model": str(zoo.save_aesthetic(f)), "head": str(f)}),
    "unified_reward": answering("unified_reward", video=False),
    "dino": lambda f: Case("dino", {"model": str(zoo.save_dino(f)), "root": with_reference(f)}),
    "siglip": lambda f: Case(
        "siglip", {"model": str(zoo.save_siglip(f)), "root": with_reference(f)}
    ),
    "adversarial": lambda f: Case(
        "adversarial", {"model": str(zoo.save_dino(f)), "root": with_reference(f), "side": 28}
    ),
    "subject_identity": tiny_subject_identity,
    "deqa": lambda f: Case("deqa", {"model": str(zoo.save_owl2(f))}),
    "geneval": tiny_geneval,
    "ocr": lambda _: Case("ocr", {"threads": 1}, 4, precisions=()),
    "jpeg_size": lambda _: Case("jpeg_size", precisions=()),
    "FrameScore of clip_score": frames,
    "video_align": tiny_video_align,
    "video_score2": answering("video_score2", video=True),
    "physics": lambda f: Case(
        "physics", {"model": str(zoo.save_vjepa2(f)), "window": 4, "context": 2}, 4, video=True
    ),
    "motion": lambda _: Case("motion", video=True, precisions=()),
    "consistency": lambda _: Case("consistency", video=True, precisions=()),
}


# Models of the published size with random weights. Models based on Qwen-VL are missing, because their
# tokenizer has to be downloaded from the hub.
def open_clip_file(folder: Path, name: str) -> str:
    """Random weights of one of open_clip's architectures."""
    torch.save(open_clip.create_model(name).state_dict(), folder / "HPS_v2.1_compressed.pt")
    return str(folder / "HPS_v2.1_compressed.pt")


def clip_model(folder: Path, text: Mapping[str, int], vision: Mapping[str, int], to: int) -> str:
    """Random weights of a ``CLIPModel`` for 224x224 pixels."""
    tokenizer = clip_tokenizer()
    ids = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    config = CLIPConfig(text_config={**text, **ids}, vision_config={**vision}, projection_dim=to)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def sizes(width: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    """Settings of a transformer whose feed-forward width is four times its width."""
    inner = {"hidden_size": width, "intermediate_size": 4 * width}
    return inner | {"num_hidden_layers": layers, "num_attention_heads": heads} | more


def real_pick_score(folder: Path) -> Case:
    """ViT-H/14, 986 million weights."""
    model = clip_model(folder, sizes(1024, 24, 16), sizes(1280, 32, 16, patch_size=14), 1024)
    return Case("pick_score", {"model": model, "processor": clip_processor(folder, 224)})


def real_aesthetic(folder: Path) -> Case:
    """ViT-L/14 and the head of 768-1024-128-64-16-1."""
    model = clip_model(folder, sizes(768, 12, 12), sizes(1024, 24, 16, patch_size=14), 768)
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    for n, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{n}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        state[f"layers.{n}.bias"] = torch.zeros(outputs)
    torch.save(state, folder / "aesthetic-model.pth")
    return Case("aesthetic", {"model": model, "head": model})


def real_dino(folder: Path) -> str:
    """DINOv2 base."""
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).save_pretrained(folder)
    return str(folder)


REAL: Mapping[str, Make] = {
    "clip_score": lambda f: Case(
        "clip_score", {"model": "ViT-L-14", "pretrained": open_clip_file(f, "ViT-L-14")}
    ),
    "pick_score": real_pick_score,
    "hpsv2": lambda f: Case("hpsv2", {"model": open_clip_file(f, "ViT-H-14")}),
    "aesthetic": real_aesthetic,
    "dino": lambda f: Case("dino", {"model": real_dino(f), "root": with_reference(f)}),
    "adversarial": lambda f: Case(
        "adversarial", {"model": real_dino(f), "root": with_reference(f)}
    ),
    "ocr": TINY["ocr"],
    "jpeg_size": TINY["jpeg_size"],
}
