"""Text rendering: agreement of the text that OCR reads in the image with the wanted text."""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.pictures import check_media, eight_bits, finite_only

__all__ = ["OCR"]

REQUIRES, EXTRA = ("rapidocr", "onnxruntime"), "ocr"
"""Packages that are imported when the reward is constructed, and flowgrpo's extra that has them."""

Reader = Callable[[UInt8[np.ndarray, "height width 3"]], Sequence[str]]
"""From an RGB image to its lines of text, in reading order; raises if it fails."""


class OCR:
    """Flow-GRPO's text reward (arXiv:2505.05470), in [0, 1].

    ``edit``: ``1 - min(d, n) / n`` with ``n`` the length of the wanted text and ``d`` its
    Levenshtein distance from all that was read, or 0 if the read text contains the wanted text;
    further text then has no cost. ``whole``: the same without this rule, as Flow-GRPO's reward for
    videos. ``exact``: 1 if the read text equals the wanted text, else 0. All ignore case and blanks.

    The wanted text is the prompt's ``metadata["text"]``, or else the only part of the prompt in
    double quotes. An image with NaN scores NaN; an error of the engine is an error here.

    The default engine is rapidocr with the PP-OCRv6 models that come in its wheel (code and models
    Apache-2.0, no download; 0.07 to 0.1 s per 512x512 image on one core of the CPU). It skips text
    that is upside down and text with a confidence below 50 %. Another engine, such as Flow-GRPO's
    PaddleOCR, gives other scores.
    """

    def __init__(
        self,
        mode: Literal["edit", "whole", "exact"] = "edit",
        longest_side: int = 320,
        threads: int = 0,
        reader: Reader | None = None,
    ):
        """
        Args:
            mode: Partial credit by edit distance, with or without the rule for further text, or all or
                nothing.
            longest_side: Longest side of the image in text detection; recognition uses the full
                size. 320 suits 256 to 512 pixels; raise it for small print in large images.
            threads: Threads of the engine; 0 for onnxruntime's default.
            reader: Another engine, which ignores the two options above.

        Raises:
            ValueError: If an option is out of range.
            ImportError: If the default engine is not installed.
        """
        if mode not in ("edit", "whole", "exact") or longest_side < 32 or threads < 0:
            raise ValueError(
                "mode must be 'edit', 'whole' or 'exact', longest_side at least 32 and threads at least 0, "
                f"got {mode!r}, {longest_side}, {threads}"
            )
        self.mode = mode
        self.read = reader or _rapidocr(longest_side, threads)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one does not say which text is wanted.
        """
        for prompt in prompts:
            wanted_text(prompt)

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt does not say which text is wanted.
        """
        check_media(media, prompts)
        targets = [plain_text(wanted_text(p)) for p in prompts]
        images = eight_bits(media).permute(0, 2, 3, 1).cpu().numpy()
        scores = [
            self.score(plain_text("".join(self.read(image))), target)
            for image, target in zip(images, targets, strict=True)
        ]
        return finite_only(torch.tensor(scores, dtype=torch.float32), media)

    def score(self, read: str, target: str) -> float:
        """The score of a read text. Both texts are without blanks and in lower case."""
        return text_score(read, target, self.mode)


def text_score(read: str, target: str, mode: str) -> float:
    """The score of a read text by one of the modes; both texts as from :func:`plain_text`."""
    if mode == "exact":
        return float(read == target)
    contained = mode == "edit" and target in read
    distance = 0 if contained else edit_distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


def wanted_text(prompt: Prompt) -> str:
    """The text that an image of the prompt should show.

    Raises:
        ValueError: If the prompt does not say, or says it twice.
    """
    text = prompt.metadata.get("text")
    if text is None:
        quoted = [a or b for a, b in re.findall('"([^"]*)"|“([^”]*)”', prompt.text)]
        if len(quoted) != 1:
            raise ValueError(
                f"prompt {prompt.text!r} has no metadata 'text' and {len(quoted)} parts in double "
                "quotes; the text to read must be given by either, once"
            )
        text = quoted[0]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt {prompt.text!r} asks for no text: {text!r}")
    return text


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the fewest insertions, deletions and replacements from ``a`` to ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def plain_text(text: str) -> str:
    """A text without blanks and in lower case."""
    return "".join(text.split()).lower()


def _rapidocr(longest_side: int, threads: int) -> Reader:
    """The default engine."""
    absent = [name for name in REQUIRES if find_spec(name) is None]
    if absent:
        raise ImportError(
            f"the OCR reward needs {' and '.join(absent)}: pip install 'flowgrpo[{EXTRA}]'"
        )
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "error",  # it warns of every image without text
            "Det.limit_type": "max",
            "Det.limit_side_len": longest_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads or -1,
        }
    )

    def read(image: UInt8[np.ndarray, "height width 3"]) -> Sequence[str]:
        result: Any = engine(np.ascontiguousarray(image[:, :, ::-1]))  # it takes BGR
        if result.boxes is not None and getattr(result, "txts", None) is None:
            raise RuntimeError("rapidocr found text but its recogniser returned nothing")
        return result.txts or ()

    return read
