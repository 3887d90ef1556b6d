"""VIEScore for edits as GEdit-Bench asks and reads it (arXiv:2312.14867).

The texts are those of ``viescore/vie_prompts.py`` of https://github.com/stepfun-ai/Step1X-Edit
(Apache-2.0), which adapts https://github.com/TIGER-AI-Lab/VIEScore (MIT, TIGER AI Lab), word for word.
"""

import io
import json
import re
from pathlib import Path

from flowgrpo.bench.base import BenchError

__all__ = ["PERCEPTION", "SEMANTICS", "edit_images", "parse_pair"]

_CONTEXT = """You are a professional digital artist. You will have to evaluate the effectiveness of the AI-generated image(s) based on given rules.
All the input images are AI-generated. All human in the images are AI-generated too. so you need not worry about the privacy confidentials.

You will have to give your output in this way (Keep your reasoning concise and short.):
{
"score" : [...],
"reasoning" : "..."
}"""

_EDIT = """RULES:

Two images will be provided: The first being the original AI-generated image and the second being an edited version of the first.
The objective is to evaluate how successfully the editing instruction has been executed in the second image.

Note that sometimes the two images might look identical due to the failure of image edit.
"""

_SEMANTICS = """
From scale 0 to 10: 
A score from 0 to 10 will be given based on the success of the editing. (0 indicates that the scene in the edited image does not follow the editing instruction at all. 10 indicates that the scene in the edited image follow the editing instruction text perfectly.)
A second score from 0 to 10 will rate the degree of overediting in the second image. (0 indicates that the scene in the edited image is completely different from the original. 10 indicates that the edited image can be recognized as a minimal edited yet effective version of original.)
Put the score in a list such that output score = [score1, score2], where 'score1' evaluates the editing success and 'score2' evaluates the degree of overediting.

Editing instruction: <instruction>
"""

_PERCEPTION = """RULES:

The image is an AI-generated image.
The objective is to evaluate how successfully the image has been generated.

From scale 0 to 10: 
A score from 0 to 10 will be given based on image naturalness. 
(
    0 indicates that the scene in the image does not look natural at all or give a unnatural feeling such as wrong sense of distance, or wrong shadow, or wrong lighting. 
    10 indicates that the image looks natural.
)
A second score from 0 to 10 will rate the image artifacts. 
(
    0 indicates that the image contains a large portion of distortion, or watermark, or scratches, or blurred faces, or unusual body parts, or subjects not harmonized. 
    10 indicates the image has no artifacts.
)
Put the score in a list such that output score = [naturalness, artifacts]
"""

SEMANTICS = "\n".join([_CONTEXT, _EDIT, _SEMANTICS])
"""The question about source and edited image, with ``<instruction>`` to be replaced."""
PERCEPTION = "\n".join([_CONTEXT, _PERCEPTION])
"""The question about the edited image alone."""
DELIMITER = "||V^=^V||"
HIGHEST = 10


def parse_pair(text: str) -> list[float] | None:
    """The two scores of an answer, each from 0 to 10; None for any other answer.

    The list stands in a JSON object under ``score``, between two delimiters or anywhere, or alone. The
    official reader takes a random number when it cannot read an answer twice; here such an answer is a
    failure.
    """
    if text.count(DELIMITER) == 2:
        text = text.split(DELIMITER)[1]
    objects = re.search(r"\{.*\}", text, re.DOTALL)
    values: object = None
    if objects is not None:
        try:
            values = json.loads(objects[0].replace("\n", " "), strict=False).get("score")
        except (ValueError, AttributeError, RecursionError):
            values = None
    if values is None:
        named = re.search(r'score"?\s*[:=]\s*(\[[^\[\]]*\])', text)
        alone = re.fullmatch(r"\s*(\[[^\[\]]*\])\s*", text)
        found = named or alone
        try:
            values = json.loads(found[1]) if found else None
        except ValueError:
            return None
    if not isinstance(values, list) or len(values) != 2:
        return None
    if not all(type(v) in (int, float) and 0 <= v <= HIGHEST for v in values):
        return None
    return [float(v) for v in values]


def edit_images(source: Path, edited: Path, form: str) -> tuple[bytes, bytes]:
    """The source and the edited image, which gets the source's size, as the judge sees them.

    Args:
        source: The image before the edit.
        edited: The image after it.
        form: ``jpeg`` (quality 75, as GPT gets it) or ``png`` (as Qwen does).

    Raises:
        BenchError: If one cannot be read.
    """
    from PIL import Image

    from flowgrpo.data.pictures import as_rgb, png_of

    pictures = []
    for path in (source, edited):
        try:
            with Image.open(path) as image:
                pictures.append(as_rgb(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise BenchError(f"{path} cannot be read: {error}") from error
    pictures[1] = pictures[1].resize(pictures[0].size)
    if form == "png":
        return png_of(pictures[0]), png_of(pictures[1])
    found = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found[0], found[1]
