"""Reading prompts from files and datasets: text, JSON lines, CSV, Parquet, Hugging Face datasets."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Image, Prompt

HUB = "hf:"
"""Prefix of the name of a Hugging Face dataset: ``hf:owner/name:split`` or ``hf:folder``."""
SIZES = {"height": 16384, "width": 16384, "num_frames": 10_000}
"""Sizes of a sample, and the largest value of each."""
PICTURES = ("control_image", "mask_image", "last_image")
"""Arguments of pipelines' calls that take a picture, besides ``image``."""
FIXED = (
    "prompt", "num_inference_steps", "timesteps", "sigmas", "latents", "strength", "generator",
    "output_type", "return_dict",
)  # fmt: skip
"""Arguments that the policy sets itself."""
OWN_KEYS = (
    "prompt", "negative_prompt", "image", "images", "metadata", "call", *SIZES, *PICTURES,
)  # fmt: skip
LISTED = 10
"""Broken records of a file that an error names."""
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
"""Suffixes of prompt files."""
PROMPT_NAMES = ("prompt", "prompts", "text", "caption", "captions", "instruction", "description")
"""Other names under which files have their prompts, in lower case."""


class PromptError(ValueError):
    """A prompt file that cannot be used. The message names the file, the line and the reason."""


def read_prompts(source: Path) -> list[Prompt]:
    """All prompts of a file or dataset.

    The key ``prompt`` is required. ``negative_prompt``, ``image`` (one) or ``images`` (a list),
    ``height``, ``width`` and ``num_frames`` are passed to the pipeline, and so are the pictures
    ``control_image``, ``mask_image`` and ``last_image`` (of ControlNets, inpainting,
    first-and-last-frame video) and a ``call`` object with any other argument of the pipeline's call.
    A ``metadata`` object and all other keys become metadata. Paths of images are relative to the
    prompt file.

    Raises:
        PromptError: On broken lines, images that cannot be read, an empty file, or an unknown suffix.
            All broken lines are named, up to :data:`LISTED`.
        FileNotFoundError: If there is no such file.
        ImportError: If a format needs a package that is not installed; the message names it.
    """
    if str(source).startswith(HUB):
        prompts = list(_read_dataset(str(source)))
    else:
        readers: dict[str, Callable[[Path], Iterator[Prompt | PromptError]]] = {
            ".txt": _read_txt,
            ".jsonl": _read_jsonl,
            ".csv": _read_csv,
            ".parquet": _read_parquet,
        }
        suffix = source.suffix.lower()
        if suffix not in readers:
            raise PromptError(
                f"{source}: unknown ending {source.suffix!r}; known: {', '.join(readers)}, and "
                f"Hugging Face datasets as {HUB}owner/name:split"
            )
        if not source.is_file():
            raise FileNotFoundError(f"no prompt file {source}")
        read = list(readers[suffix](source))
        _raise_all([r for r in read if isinstance(r, PromptError)])
        prompts = [r for r in read if isinstance(r, Prompt)]
    if not prompts:
        raise PromptError(f"{source}: no prompts in it")
    return prompts


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; line ends are ``\\n``.

    Raises:
        PromptError: If it has another encoding.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise PromptError(f"{path} is in UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise PromptError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _raise_all(faults: Sequence[PromptError]) -> None:
    """Raise one error with the messages of all, if there are any."""
    if faults:
        more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        raise PromptError("\n".join([*map(str, faults[:LISTED]), *more])) from faults[0]


def _read_txt(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip():
            yield prompt_of({"prompt": line.strip()}, f"{path}, line {number}", path.parent)


def _read_jsonl(path: Path) -> Iterator[Prompt | PromptError]:
    for where, line in _lines(path):
        try:
            yield prompt_of(_value(line, where), where, path.parent)
        except PromptError as error:
            yield error


def records_of_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, each with the name of its line for messages.

    Raises:
        PromptError: On a line that is not valid JSON, or a file that is not UTF-8.
    """
    for where, line in _lines(path):
        yield where, _value(line, where)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not empty, each after its name for messages."""
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def _value(line: str, where: str) -> Any:
    """The value of a line of JSON. Raises PromptError if it is not valid."""
    try:
        return json.loads(line, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise PromptError(f"{where}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise PromptError(f"{where}: {error}") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones Python's parser would keep the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return table


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _read_csv(path: Path) -> Iterator[Prompt | PromptError]:
    reader = csv.reader(io.StringIO(text_of(path), newline=""))
    rows = _csv_rows(reader, path)
    _, header = next(rows, (0, []))
    twice = [k for k in header if header.count(k) > 1]
    if twice:
        raise PromptError(f"{path}: the column {twice[0]!r} is there twice")
    for number, row in rows:
        where = f"{path}, line {number}"
        if len(row) > len(header):
            raise PromptError(
                f"{where}: {counted(len(row), 'cell')}, but the header has {len(header)}; put text with a comma in "
                'quotes: "a red cube, a blue ball"'
            )
        # Every cell is text; an empty cell of a known key means that it is not set, as does a cell that
        # is missing at the end of a line.
        cells = {k: v for k, v in zip(header, row, strict=False) if k not in OWN_KEYS or v}
        try:
            numbers = {k: _number(v, k, where) for k, v in cells.items() if k in SIZES}
            yield prompt_of({**cells, **numbers}, where, path.parent)
        except PromptError as error:
            yield error


def _csv_rows(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, with the lines on which they begin.

    Raises:
        PromptError: If a row cannot be read.
    """
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise PromptError(f"{path}, line {line}: not valid CSV: {error}") from error
        if row:
            yield line, row


def _read_parquet(path: Path) -> Iterator[Prompt]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: Parquet files need pyarrow: pip install 'flowgrpo[data]'"
        ) from error
    try:
        records = parquet.read_table(path).to_pylist()
    # pyarrow's own errors are subclasses of these; text that is not UTF-8 is a UnicodeDecodeError.
    except (OSError, ValueError, NotImplementedError) as error:
        raise PromptError(f"{path} cannot be read as Parquet: {error}") from error
    for number, record in enumerate(records, start=1):
        yield prompt_of(record, f"{path}, row {number}", path.parent)


def _read_dataset(source: str) -> Iterator[Prompt]:
    """Read a dataset on the hub, or a folder that ``Dataset.save_to_disk`` wrote."""
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError(f"{source} needs datasets: pip install 'flowgrpo[data]'") from error
    name, _, split = source.removeprefix(HUB).partition(":")
    saved = any((Path(name) / f).exists() for f in ("dataset_info.json", "dataset_dict.json"))
    try:
        rows = load_from_disk(name) if saved else load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"{source}: the dataset cannot be loaded: {error}") from error
    if isinstance(rows, Mapping):
        if (split or "train") not in rows:
            raise PromptError(f"{source}: no split {split or 'train'!r}; there: {', '.join(rows)}")
        rows = rows[split or "train"]
    for number, record in enumerate(rows, start=1):
        yield prompt_of(record, f"{source}, row {number}", Path(name))


def prompt_of(record: Any, where: str, folder: Path) -> Prompt:
    """The prompt of a record.

    Args:
        record: Its keys and values; see :func:`read_prompts`.
        where: Where it comes from, for messages.
        folder: The folder that its paths are relative to.

    Raises:
        PromptError: If it is none, or one of its images cannot be read.
    """
    if not isinstance(record, dict):
        raise PromptError(f"{where}: expected an object with a key 'prompt', got {record!r}")
    text, negative = record.get("prompt"), record.get("negative_prompt")
    if not isinstance(text, str) or not text.strip():
        raise PromptError(
            f"{where}: needs a key 'prompt' with some text; keys there: {', '.join(map(str, record))}"
            + _advice_on_keys(list(map(str, record)))
        )
    if negative is not None and not isinstance(negative, str):
        raise PromptError(f"{where}: 'negative_prompt' must be text, got {negative!r}")
    _refuse_misspelt(record, where)
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise PromptError(f"{where}: 'metadata' must be an object, got {metadata!r}")
    call = record.get("call") or {}
    if not isinstance(call, dict):
        raise PromptError(f"{where}: 'call' must be an object, got {call!r}")
    for key, value in {"prompt": text, "negative_prompt": negative, **metadata, **record}.items():
        check_text(value, f"{where}: {key!r}")
    if own := [k for k in call if k in OWN_KEYS and k != "prompt"]:
        raise PromptError(
            f"{where}: 'call' cannot hold {own[0]!r}; give it as a key of its own, next to 'prompt'"
        )
    if fixed := [k for k in call if k in FIXED]:
        raise PromptError(f"{where}: 'call' cannot hold {fixed[0]!r}, which is the same for all")
    rest = {k: v for k, v in record.items() if k not in OWN_KEYS}
    pictures = {k: record[k] for k in PICTURES if record.get(k) is not None}
    call = call | {k: _image(v, where, folder) for k, v in pictures.items()}
    sizes: dict[str, Any] = {
        k: _size(record[k], k, where) for k in SIZES if record.get(k) is not None
    }
    images = _images(record, where, folder)
    return Prompt(text, negative or None, {**rest, **metadata}, images, call=call, **sizes)


def check_text(value: Any, where: str = "the prompt") -> None:
    """Raise PromptError if a text has half of a surrogate pair, which no tokenizer can encode."""
    if not isinstance(value, str):
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} has an unpaired surrogate, U+{ord(value[error.start]):04X}, at character "
            f"{error.start + 1}: half of a character such as an emoji, cut off by another program; remove it"
        ) from error


def _advice_on_keys(keys: Sequence[str]) -> str:
    """How a record without a prompt is mended, if its keys tell; else nothing."""
    if len(keys) == 1 and any(mark in keys[0] for mark in ";\t"):
        return "; separate the cells of a CSV file by commas"
    if "prompt" in keys:
        return ""
    named = next((k for k in keys if k.strip().lower() in PROMPT_NAMES), None)
    return f"; rename {named!r} to 'prompt'" if named is not None else ""


def _refuse_misspelt(record: Mapping[str, Any], where: str) -> None:
    """Raise PromptError if a key looks like a misspelt one of :data:`OWN_KEYS`: it would be metadata."""
    for key in (k for k in record if k not in OWN_KEYS):
        for own in OWN_KEYS:
            if str(key)[:1].lower() == own[0] and _is_near(str(key).lower(), own):
                raise PromptError(
                    f"{where}: unknown key {key!r}; did you mean {own!r}? If it is data for a reward, put it "
                    "into 'metadata'"
                )


def _is_near(word: str, known: str) -> bool:
    """Whether one letter is wrong, missing, additional or exchanged with the next; two in long words."""
    most = 2 if len(known) > 8 else 1
    if abs(len(word) - len(known)) > most:
        return False
    before: list[int] = []
    row = list(range(len(known) + 1))
    for i, a in enumerate(word, start=1):
        older, before, row = before, row, [i]
        for j, b in enumerate(known, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and (a, word[i - 2]) == (known[j - 2], b):
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1] <= most


def _number(value: str, key: str, where: str) -> int:
    if not value.strip().isdigit():
        raise PromptError(f"{where}: {key!r} must be a whole number, got {value!r}")
    return int(value)


def _size(value: Any, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PromptError(f"{where}: {key!r} must be a whole number above 0, got {value!r}")
    if value > SIZES[key]:
        raise PromptError(f"{where}: {key!r} must be at most {SIZES[key]}, got {value}")
    return value


def _images(record: Mapping[str, Any], where: str, folder: Path) -> Sequence[Path | Image]:
    """The input images of a record; each is checked to be readable."""
    image, images = record.get("image"), record.get("images")
    if image is not None and images is not None:
        raise PromptError(f"{where}: give 'image' or 'images', not both")
    if images is not None and not isinstance(images, list):
        raise PromptError(f"{where}: 'images' must be a list, got {images!r}")
    values = images if images is not None else [image] if image is not None else []
    return tuple(_image(v, where, folder) for v in values)


def _image(value: Any, where: str, folder: Path) -> "Path | Image":
    """An image given by its file, by its bytes (as in Parquet files), or in memory."""
    from PIL import Image as pil

    from flowgrpo.data.pictures import UNREADABLE, as_rgb, check_depth

    if isinstance(value, pil.Image):
        return value
    if isinstance(value, dict) and value.get("bytes"):
        try:
            return as_rgb(pil.open(io.BytesIO(value["bytes"])))
        except UNREADABLE as error:
            raise PromptError(f"{where}: the image in it cannot be read: {error}") from error
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise PromptError(f"{where}: an image must be the name of a file, got {value!r}")
    path = folder / name
    try:
        with pil.open(path) as image:
            check_depth(image)
            image.verify()
    except UNREADABLE as error:
        raise PromptError(f"{where}: image {path} cannot be read: {error}") from error
    return path


def names_prompts(text: str) -> bool:
    """Whether a text is the name of a prompt file or of a dataset, rather than a prompt.

    So is the name of any other file that exists, which :func:`read_prompts` then refuses.
    """
    if text.startswith(HUB) or text.lower().endswith(SUFFIXES):
        return True
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False
