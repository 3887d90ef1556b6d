"""Vision-language models that their authors publish as judges, asked in the authors' words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.chat import Chat
from reward_models.shared.judges import JUDGES, Question
from reward_models.shared.pictures import check_media, pictures, source_picture
from reward_models.shared.templates import check_pictures, pictures_of

__all__ = ["PublishedJudge"]


class PublishedJudge:
    """The score that a published judge gives an image, a video or an edit, by its authors' rule.

    The model runs behind an OpenAI-compatible endpoint. By ``judge``:

    - ``unified_reward_1``: UnifiedReward as Flow-GRPO and DiffusionNFT report it. Images of 512x512,
      the first "Final Score", divided by 5: 0.2 to 1. A LLaVA model, which SGLang serves.
    - ``unified_reward_2``: the mean of three grades, 1 to 5, of an image or of 16 frames of a video
      (arXiv:2503.05236).
    - ``unified_reward_edit``: two grades of the edit and two of its result, 0 to 25 each. The
      authors publish no rule that combines them; here it is EditScore's.
    - ``edit_r1``: the expected digit 0 to 5 for an edit, divided by 5 (Edit-R1 of UniWorld-V2,
      arXiv:2510.16888). Any model; the default is the authors'. The prompt's metadata may hold a
      ``requirement``.
    - ``edit_score``: ``sqrt(min(a, b) min(c, d)) / 2.5`` of two grades of the edit and two of its
      result, 0 to 10 (arXiv:2509.23909). ``edit_score_qwen25`` is the same for the models based on
      Qwen2.5-VL, which number the pictures. The adapters have to be merged or served as such.
    - ``rational_rewards``: an edit's text faithfulness, visual quality and text rendering, if there
      is any, 1 to 4 each; ``(mean - 1) / 3`` (arXiv:2604.11626). As in the released training code
      the grade of image faithfulness does not count.
    - ``vision_reward``: VisionReward's checklist (arXiv:2412.21059): 30 questions and the alignment
      about an image, 29 questions about a video; a weighted sum of 1 for yes and -1 for no. The
      authors' own models run only with code of theirs; this asks any model. The alignment is the
      judge's probability of "yes", where the authors use ``clip-flant5-xxl``.
    - ``deqa``: DeQA-Score's question (arXiv:2501.11561): the mean of 5 for "excellent" to 1 for
      "bad" by the probabilities of these words. This asks any model, and the server must continue
      a message that was begun (vLLM does); the reward ``deqa`` is the authors' model.

    Answers are greedy. Pictures are sent as PNG, where the authors send JPEG of quality 95 or 75. An
    answer that cannot be used is never replaced by a number, as the released code does: the score is
    NaN, and ``chat.unparsed`` counts it. ``passes`` asks several times at temperature 0.7 and takes
    the mean over the usable answers; EditScore's training takes 4.

    An image with NaN scores NaN. It was not tested with the published weights, which were not
    available.
    """

    def __init__(
        self,
        judge: str,
        model: str = "",
        base_url: str | Sequence[str] = "http://127.0.0.1:8000/v1",
        passes: int = 1,
        source_key: str = "image",
        frames: int = 0,
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
            judge: One of the names above.
            model: Name of the model at the server; by default the authors' hub id.
            base_url: One server or several equal ones.
            passes: How often each question is asked; 1 is greedy.
            source_key: Metadata key of the file with the picture before an edit, for prompts
                without a condition image.
            frames: Most frames of a video that are shown; 0 for the judge's own number.
            longest_side: Larger pictures are shrunk to this length; 0 keeps them.
            api_key_env, timeout, patience, concurrency, cache, extra: As for
                :class:`reward_models.shared.chat.Chat`.

        Raises:
            ValueError: If an option is wrong, the key is refused, or the server does not have the
                model.
        """
        if judge not in JUDGES:
            raise ValueError(f"no judge {judge!r}: choose one of {', '.join(JUDGES)}")
        if passes < 1 or frames < 0:
            raise ValueError(
                f"passes must be at least 1 and frames at least 0, got {passes}, {frames}"
            )
        check_pictures(1, longest_side, 1)
        self.name, self.judge = judge, JUDGES[judge]()
        self.passes, self.source_key, self.longest_side = passes, source_key, longest_side
        self.frames = frames or self.judge.frames
        self.chat = Chat(
            model or self.judge.model, base_url, api_key_env, timeout, patience, concurrency, cache,
            {**self.judge.extra, **(extra or {})},
        )  # fmt: skip

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one has no picture before the edit, and the judge compares with it.
            OSError: If the picture cannot be read.
        """
        if self.judge.edits:
            for prompt in prompts:
                source_picture(prompt, self.source_key)

    def __call__(
        self, media: Float[Tensor, "batch *frames 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If the judge does not judge such media, or a prompt lacks its picture.
            RuntimeError: If every question failed; names the first error.
        """
        video = media.ndim == 5
        check_media(media, prompts, video=video)
        questions = self.judge.video if video else self.judge.image
        if not questions:
            raise ValueError(f"{self.name!r} judges {'images' if video else 'videos'} only")
        rows = media.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        samples = [self._sample(media[row], prompts[row]) for row in rows]
        result = torch.full((len(prompts),), math.nan)
        if not samples:
            return result
        passes = [self._pass(questions, samples, number) for number in range(self.passes)]
        result[rows] = torch.tensor(passes).nanmean(0)
        return result

    def _sample(
        self, medium: Float[Tensor, "*frames 3 height width"], prompt: Prompt
    ) -> tuple[dict[str, str], dict[str, list[bytes]]]:
        """The texts and the pictures that questions about a sample are filled with."""
        if medium.ndim == 4 and self.judge.from_start:
            number = len(medium)
            medium = medium[[i * number // self.frames for i in range(self.frames)]]
        if self.judge.side:
            side = (self.judge.side, self.judge.side)
            # Pillow's default filter, bicubic, as in the released code.
            medium = pil_to_tensor(pictures(medium[None])[0].resize(side)).float() / 255
        shown = {"result": pictures_of(medium, self.frames, self.longest_side)}
        if self.judge.edits:
            source = source_picture(prompt, self.source_key)
            shown["source"] = pictures_of(source, 1, self.longest_side)
        requirement = str(prompt.metadata.get("requirement", ""))
        return {"prompt": prompt.text, "requirement": requirement}, shown

    def _pass(
        self,
        questions: Sequence[Question],
        samples: Sequence[tuple[dict[str, str], dict[str, list[bytes]]]],
        number: int,
    ) -> list[float]:
        """The score of each sample in one pass; NaN where an answer is missing."""
        settings: dict[str, Any] = {}
        if self.passes > 1:
            settings = {"temperature": 0.7, "top_p": 0.9, "seed": 42 + number}
        answers: list[list[list[float] | None]] = [[] for _ in samples]
        # Questions of one form are asked together; their samples are in order.
        for question in questions:
            found = self.chat.ask_all(
                [question.fill(*sample) for sample in samples],
                question.read,
                max_tokens=question.max_tokens,
                first=question.first,
                system=question.system,
                begins=question.begins,
                settings=settings,
            )
            for own, numbers in zip(answers, found, strict=True):
                own.append(numbers)
        scores = []
        for own in answers:
            usable = [numbers for numbers in own if numbers is not None]
            scores.append(self.judge.combine(usable) if len(usable) == len(own) else math.nan)
        return scores
