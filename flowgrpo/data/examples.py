"""Reading pictures, or pairs of pictures, that a run is trained on: files of JSON lines and folders.

Three forms are read:

- JSON lines: ``{"prompt": ..., "picture": ..., "weight": ...}`` for pictures, ``{"prompt": ...,
  "chosen": ..., "rejected": ...}`` for pairs. Further keys are those of prompt files.
- A folder: with a ``metadata.jsonl`` (the layout ``imagefolder`` of Hugging Face datasets), or with a
  ``.txt`` file of the same name beside each picture.
- A folder of votes of ``flowgrpo vote``: each vote that is not a tie is a pair.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flowgrpo.core.imports import suggest
from flowgrpo.data.prompt_files import PromptError, prompt_of, records_of_lines, text_of
from flowgrpo.data.prompts import Prompt

METADATA = "metadata.jsonl"
"""The file of a folder that names its pictures and their texts."""
TEXTS = ("prompt", "text", "caption")
"""Keys of the text; the first one is that of prompt files."""
PICTURE: Sequence[Sequence[str]] = (("picture",), ("file_name",))
"""Keys of a picture: flowgrpo's own, and that of an ``imagefolder``."""
PAIR: Sequence[Sequence[str]] = (
    ("chosen", "rejected"),
    ("preferred", "other"),
    ("chosen_file_name", "rejected_file_name"),
)
"""Keys of a pair: flowgrpo's own, those of ``pairs.jsonl`` in a folder of votes, and those of an
``imagefolder``, where all keys of pictures end with ``file_name``."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of pictures in a folder without ``metadata.jsonl``."""
READERS = 8
"""Threads that read pictures; decoding runs outside of Python's lock."""


@dataclass(frozen=True)
class _Example:
    """A prompt with pictures that have not been opened, and the place that messages name."""

    where: str
    prompt: Prompt


def read_examples(source: Path, pictures: int) -> list[Prompt]:
    """All pictures, or pairs, of a file or folder, as prompts with ``targets``.

    Every picture is decoded once, so that a broken one is found before training.

    Args:
        source: The file or folder.
        pictures: 1 for pictures, 2 for pairs.

    Raises:
        PromptError: On a broken line, an example without text or pictures, a picture that is missing,
            broken or has more than 8 bits, a pair of one picture, or a source without examples.
        FileNotFoundError: If there is no such file or folder.
    """
    found = list(_examples(source, pictures))
    if not found:
        raise PromptError(f"{source}: no {_name(pictures)} in it")
    places: dict[Path, str] = {}
    for example in found:
        for path in example.prompt.targets:
            places.setdefault(path, example.where)
    with ThreadPoolExecutor(READERS) as pool:
        for problem in pool.map(_problem, places, places.values()):
            if problem:
                raise PromptError(problem)
    return [e.prompt for e in found]


def _name(pictures: int) -> str:
    return "pairs of pictures" if pictures == 2 else "pictures with prompts"


def _examples(source: Path, pictures: int) -> Iterator[_Example]:
    from flowgrpo.data.votes import VOTES, is_ballot

    if is_ballot(source):
        if pictures != 2:
            raise PromptError(
                f"{source} has votes on pairs of pictures: use algorithm.kind = 'pairs', or name a folder of pictures"
            )
        return _votes(source.parent if source.name == VOTES else source)
    if source.is_dir():
        if (source / METADATA).is_file():
            return _lines(source / METADATA, pictures)
        return _captioned(source, pictures)
    if source.suffix.lower() != ".jsonl":
        raise PromptError(
            f"{source}: {_name(pictures)} are read from .jsonl files, from folders with {METADATA} or with a "
            ".txt file for each picture, and from folders of votes; write the pictures to files and their "
            "paths to a .jsonl file"
        )
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    return _lines(source, pictures)


def _lines(path: Path, pictures: int) -> Iterator[_Example]:
    """The examples of a file of JSON lines; paths are relative to the file."""
    for where, record in records_of_lines(path):
        if not isinstance(record, dict):
            raise PromptError(f"{where}: expected an object, got {record!r}")
        yield _example(record, where, path.parent, pictures)


def _example(record: Mapping[str, Any], where: str, folder: Path, pictures: int) -> _Example:
    wanted = PAIR if pictures == 2 else PICTURE
    keys = next((k for k in wanted if all(name in record for name in k)), None)
    if keys is None:
        raise PromptError(_missing(record, where, pictures))
    targets = tuple(_path(record[key], key, where, folder) for key in keys)
    if len(set(targets)) < len(targets):
        raise PromptError(f"{where}: {keys[0]!r} and {keys[1]!r} are the same picture")
    rest = {k: v for k, v in record.items() if k not in keys}
    weight = 1.0 if pictures == 2 else _weight(rest.pop("weight", 1.0), where)
    text = next((key for key in TEXTS if key in rest), None)
    if text is None:
        raise PromptError(
            f"{where}: needs a key 'prompt' with some text; keys there: {', '.join(map(str, record))}"
        )
    if not isinstance(rest[text], str) or not rest[text].strip():
        raise PromptError(f"{where}: {text!r} must be some text, got {rest[text]!r}")
    rest = {"prompt": rest.pop(text), **rest}
    return _Example(where, replace(prompt_of(rest, where, folder), targets=targets, weight=weight))


def _missing(record: Mapping[str, Any], where: str, pictures: int) -> str:
    """A sentence about a record without the keys of its pictures."""
    others = PICTURE if pictures == 2 else PAIR
    if any(all(name in record for name in k) for k in others):
        other = "pictures" if pictures == 2 else "pairs"
        has = "a single picture" if pictures == 2 else "a pair of pictures"
        return f"{where}: has {has}; train on it with algorithm.kind = {other!r}"
    wanted = (PAIR if pictures == 2 else PICTURE)[0]
    near = next(filter(None, (suggest(key, wanted) for key in record if key not in wanted)), "")
    names = " and ".join(map(repr, wanted))
    return f"{where}: needs {names}{near}; keys there: {', '.join(map(str, record))}"


def _path(value: Any, key: str, where: str, folder: Path) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{where}: {key!r} must be the name of a file, got {value!r}")
    return folder / Path(value).expanduser()


def _weight(value: Any, where: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < float("inf"):
        raise PromptError(f"{where}: 'weight' must be a number above 0, got {value!r}")
    return float(value)


def _captioned(folder: Path, pictures: int) -> Iterator[_Example]:
    """The pictures of a folder, each with its text in a ``.txt`` file of the same name."""
    if pictures == 2:
        raise PromptError(
            f"{folder}: a folder of pairs needs a file {METADATA} with 'prompt', 'chosen' and 'rejected' on each "
            "line, or is a folder of votes"
        )
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    stems = Counter(p.stem for p in files)
    for path in files:
        if stems[path.stem] > 1:
            raise PromptError(f"{folder}: several pictures are named {path.stem!r}; rename them")
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise PromptError(
                f"{path}: there is no {caption.name} with its prompt beside it, and the folder has no {METADATA}"
            )
        text = " ".join(text_of(caption).split())
        if not text:
            raise PromptError(f"{caption}: is empty; write the prompt of {path.name} into it")
        yield _Example(str(path), Prompt(text, targets=(path,)))


def _votes(folder: Path) -> Iterator[_Example]:
    """The pairs of a folder of votes: one for each vote that is not a tie."""
    from flowgrpo.data.votes import read_votes

    try:
        ballot, votes = read_votes(folder)
    except (ValueError, OSError) as error:
        raise PromptError(str(error)) from error
    for vote in votes:
        if vote.choice in ("first", "second"):
            pair = ballot.pairs[vote.pair]
            order = [pair.first, pair.second]
            better, worse = order if vote.choice == "first" else reversed(order)
            targets = (ballot.picture(better), ballot.picture(worse))
            where = f"{folder}, pair {vote.pair + 1}"
            if better.file == worse.file:
                raise PromptError(f"{where}: both pictures are the same")
            if not pair.prompt.strip():
                raise PromptError(f"{where}: has no prompt")
            yield _Example(where, Prompt(pair.prompt, targets=targets))


def _problem(path: Path, where: str) -> str:
    """A sentence about a picture that cannot be trained on; empty if it can."""
    from PIL import Image

    from flowgrpo.data.pictures import UNREADABLE, check_depth

    if not path.is_file():
        return f"{where}: there is no picture {path}"
    try:
        with Image.open(path) as picture:
            check_depth(picture)
            picture.load()
    except UNREADABLE as error:
        return f"{where}: picture {path} cannot be read: {error}"
    return ""


def smaller_than(prompts: Sequence[Prompt], height: int, width: int) -> int:
    """The number of prompts with a picture that must be enlarged to a size in pixels."""
    with ThreadPoolExecutor(READERS) as pool:
        small = pool.map(partial(_is_smaller, height=height, width=width), prompts)
        return sum(small)


def _is_smaller(prompt: Prompt, height: int, width: int) -> bool:
    from PIL import Image

    for path in prompt.targets:
        with Image.open(path) as picture:
            if picture.height < height or picture.width < width:
                return True
    return False
