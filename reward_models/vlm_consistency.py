"""Consistency of the pictures of a grid, or of an edit with its source, after PaCo-RL (arXiv:2512.04784)."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.answers import Answer
from reward_models.shared.chat import Chat
from reward_models.shared.pictures import check_media, source_picture
from reward_models.shared.templates import Content, Template, check_pictures, pictures_of

__all__ = ["VLMConsistency"]

GRID = re.compile(r"(\d+)\s*[x×⨉]\s*(\d+)")


class VLMConsistency:
    """The probability of "Yes" to questions about pairs of pictures, in [0, 1].

    ``grid``: an image is cut into its rows and columns, and every pair of cells is asked for
    consistency of subjects, style and content; the score is the mean over the pairs. Rows and
    columns are the prompt's ``metadata["grid"]``, ``[2, 2]``, or the first "2x2" in its text.

    ``edit``: the picture before the edit and the one after it are asked for consistency of all that
    the instruction does not change, and for whether the instruction was followed; the score is the
    geometric mean. The picture before the edit is the prompt's condition image.

    Each answer is ``P(yes) / (P(yes) + P(no))`` of the first token, over all spellings. PaCo-RL's
    model is ``X-GenGroup/PaCo-Reward-7B`` (a Qwen2.5-VL-7B), which any endpoint serves; another model
    works too. Differs from its code: the wording, because the repository has no licence (the option
    ``templates`` takes yours); and a failed question, which scores 0 there and NaN here.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = "http://127.0.0.1:8000/v1",
        mode: Literal["grid", "edit"] = "grid",
        templates: Sequence[str] = (),
        source_key: str = "image",
        longest_side: int = 0,
        api_key_env: str = "",
        timeout: float = 120.0,
        patience: float = 300.0,
        concurrency: int = 16,
        cache: str = "",
        extra: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            model: Name of the model at the server.
            base_url: One server or several equal ones.
            mode: What is compared; see above.
            templates: Questions with ``$first``, ``$second`` and ``$prompt``: one for ``grid``; for
                ``edit`` those for consistency and for the instruction. By default this library's.
            source_key: Metadata key of the file with the picture before an edit, for prompts
                without a condition image.
            longest_side: Larger pictures are shrunk to this length; 0 keeps them.
            api_key_env, timeout, patience, concurrency, cache, extra: As for
                :class:`reward_models.shared.chat.Chat`.

        Raises:
            ValueError: If an option or a template is invalid, the key is refused, or the server
                does not have the model.
            FileNotFoundError: If there is no such template.
        """
        own = {"grid": ["consistent_pair"], "edit": ["consistent_edit", "followed_edit"]}
        if mode not in own:
            raise ValueError(f"mode must be 'grid' or 'edit', got {mode!r}")
        names = list(templates) or own[mode]
        if len(names) != len(own[mode]):
            raise ValueError(
                f"templates of mode {mode!r} must be {len(own[mode])}, got {len(names)}: {names}"
            )
        check_pictures(1, longest_side, 1)
        self.mode, self.source_key, self.longest_side = mode, source_key, longest_side
        self.templates = [Template.load(n, ("prompt",), ("first", "second")) for n in names]
        self.chat = Chat(
            model, base_url, api_key_env, timeout, patience, concurrency, cache, extra
        )  # fmt: skip

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one has no rows and columns, or no picture before the edit.
            OSError: If that picture cannot be read.
        """
        for prompt in prompts:
            if self.mode == "grid":
                grid_of(prompt)
            else:
                source_picture(prompt, self.source_key)

    def __call__(
        self, media: Float[Tensor, "batch 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt lacks its grid or picture, or an image is smaller than its grid.
            RuntimeError: If every question failed; names the first error.
        """
        check_media(media, prompts)
        rows = media.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        questions: list[Content] = []
        counts = []
        for row in rows:
            own = self._questions(media[row], prompts[row])
            questions += own
            counts.append(len(own))
        found = self.chat.ask_all(questions, _yes, max_tokens=1, first=True)
        values = torch.tensor([math.nan if v is None else v for v in found])
        scores = torch.full((len(prompts),), math.nan)
        for row, own_values in zip(rows, values.split(counts), strict=True):
            edit = self.mode == "edit"
            scores[row] = own_values.prod().sqrt() if edit else own_values.mean()
        return scores

    def _questions(self, image: Float[Tensor, "3 height width"], prompt: Prompt) -> list[Content]:
        if self.mode == "edit":
            pairs = [(source_picture(prompt, self.source_key), image)] * 2
            templates = self.templates
        else:
            pairs = list(combinations(cells(image, *grid_of(prompt)), 2))
            templates = self.templates * len(pairs)
        return [
            template.fill(
                {"prompt": prompt.text},
                {
                    name: pictures_of(picture, 1, self.longest_side)
                    for name, picture in zip(("first", "second"), pair, strict=True)
                },
            )
            for template, pair in zip(templates, pairs, strict=True)
        ]


def grid_of(prompt: Prompt) -> tuple[int, int]:
    """Rows and columns of the images of a prompt.

    Raises:
        ValueError: If the prompt does not say, or there are fewer than two cells.
    """
    named = prompt.metadata.get("grid")
    if named is None:
        found = GRID.search(prompt.text)
        named = [int(n) for n in found.groups()] if found else None
    sizes = list(named) if isinstance(named, list | tuple) else []
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes) or sizes == [1, 1]:
        raise ValueError(
            f"prompt {prompt.text!r} needs metadata 'grid', [rows, columns] of at least two cells, or "
            f"such as 2x2 in its text; got {named!r}"
        )
    return sizes[0], sizes[1]


def cells(
    image: Float[Tensor, "3 height width"], rows: int, columns: int
) -> list[Float[Tensor, "3 h w"]]:
    """The cells of a grid, row by row; pixels that are left over at the end are cut.

    Raises:
        ValueError: If the image has fewer pixels than cells in a direction.
    """
    height, width = image.shape[-2] // rows, image.shape[-1] // columns
    if not height or not width:
        raise ValueError(f"an image of {tuple(image.shape[-2:])} has no {rows}x{columns} cells")
    return [
        image[:, y * height : (y + 1) * height, x * width : (x + 1) * width]
        for y in range(rows)
        for x in range(columns)
    ]


def _yes(answer: Answer) -> float | None:
    shares = answer.share(["yes", "no"])
    return None if shares is None else shares[0]
