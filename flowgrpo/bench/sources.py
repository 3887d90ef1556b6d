"""Source images of editing benchmarks: taken out of a dataset once, and sent to a judge."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import BenchError
from flowgrpo.bench.data import HUB
from flowgrpo.bench.files import fingerprint, write_atomically, write_json

INDEX = "index.json"
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
"""Beginnings of image files -> their endings."""


def image_suffix(content: bytes) -> str:
    """The ending of an image file, by its content; empty if the format is unknown."""
    return next((s for begin, s in SUFFIXES.items() if content.startswith(begin)), "")


def open_dataset(source: str, split: str, how: str) -> Any:
    """A dataset on the hub (``hf:owner/name``) or in a folder, with images as encoded bytes.

    Raises:
        BenchError: If it is not there, or the package datasets is not installed.
    """
    if not source:
        raise BenchError(f"this benchmark needs its data: give --data. {how}")
    try:
        from datasets import Image, load_dataset, load_from_disk
    except ImportError as error:
        raise BenchError(f"{source} needs datasets: pip install 'flowgrpo[data]'") from error
    path = Path(source)
    try:
        if source.startswith(HUB):
            found = load_dataset(source.removeprefix(HUB), split=split)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = load_from_disk(source)
            found = found if (path / "state.json").is_file() else found[split]
        elif path.is_dir():
            found = load_dataset(source, split=split)
        else:
            raise FileNotFoundError("no such folder")
    except Exception as error:  # datasets raises anything
        raise BenchError(f"{source} cannot be loaded as a dataset: {error}. {how}") from error
    for name, feature in found.features.items():
        if isinstance(feature, Image):
            found = found.cast_column(name, Image(decode=False))
    return found


def extract(
    source: str,
    rows: Any,
    folder: str,
    name: str,
    texts: Mapping[str, type],
    images: Sequence[str],
) -> tuple[list[dict[str, Any]], str]:
    """Write the images of a dataset as files, once.

    Args:
        source: As the user named the dataset.
        rows: The dataset, with images as encoded bytes.
        folder: Where to write; empty for the assets cache of huggingface_hub.
        name: Of the benchmark.
        texts: Columns that are kept, and their types.
        images: Columns with images, whose value becomes the path of a file.

    Returns:
        The records, and a SHA-256 of their contents.

    Raises:
        BenchError: If a column is missing, a value has another type, or an image is damaged.
    """
    if absent := [c for c in (*texts, *images) if c not in rows.column_names]:
        raise BenchError(
            f"{source} has no column {absent[0]!r}: it has {', '.join(rows.column_names)}"
        )
    known = str(getattr(rows, "_fingerprint", ""))
    place = (
        Path(folder) if folder else _assets(name, fingerprint({"rows": known, "source": source}))
    )
    index = place / INDEX
    if index.is_file():
        table = json.loads(index.read_text(encoding="utf-8"))
        if table["rows"] == known and known and all((place / f).is_file() for f in table["files"]):
            return _resolved(table["records"], place, images), table["sha256"]
    total, records = hashlib.sha256(), []
    for number, row in enumerate(rows):
        record = _record(row, f"{source}, row {number}", place, texts, images)
        total.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
        records.append(record)
    files = sorted({r[c] for r in records for c in images})
    table = {"rows": known, "sha256": total.hexdigest(), "files": files, "records": records}
    write_json(index, table)
    return _resolved(records, place, images), total.hexdigest()


def _record(
    row: Mapping[str, Any],
    where: str,
    place: Path,
    texts: Mapping[str, type],
    images: Sequence[str],
) -> dict[str, Any]:
    """The values of a row that are kept; its images are written to ``place``, named by their hash."""
    record: dict[str, Any] = {}
    for column, kind in texts.items():
        value = row[column]
        if not isinstance(value, kind):
            raise BenchError(f"{where}: {column} is {value!r}, not {kind.__name__}")
        record[column] = value
    for column in images:
        content = (row[column] or {}).get("bytes") or _file(row[column])
        suffix = image_suffix(content)
        if not suffix:
            raise BenchError(f"{where}: {column} is no PNG, JPEG or WebP image")
        record[column] = f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        if not (place / record[column]).is_file():
            write_atomically(place / record[column], content)
    return record


def _file(value: Mapping[str, Any] | None) -> bytes:
    """The bytes of an image that a dataset names by its path; empty if it cannot be read."""
    try:
        return Path(value["path"]).read_bytes() if value and value.get("path") else b""
    except OSError:
        return b""


def _assets(name: str, key: str) -> Path:
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("flowgrpo", namespace=name, subfolder=key))


def _resolved(
    records: Iterable[Mapping[str, Any]], place: Path, images: Sequence[str]
) -> list[dict[str, Any]]:
    return [{**r, **{c: place / r[c] for c in images}} for r in records]


def sent_bytes(path: Path) -> bytes:
    """An image file as it is if it is PNG or JPEG, else as PNG.

    Raises:
        BenchError: If it cannot be read.
    """
    from PIL import Image

    from flowgrpo.data.pictures import as_rgb, png_of

    try:
        with Image.open(path) as image:
            image.load()
            if image.format in ("PNG", "JPEG"):
                return path.read_bytes()
            return png_of(as_rgb(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
