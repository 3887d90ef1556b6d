"""Prompt files of benchmarks: where they are, and whether they are the published ones."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import BenchError, Data
from flowgrpo.config import find

HUB = "hf:"


def open_data(
    source: str, published: Mapping[str, str], any_data: bool = False, how: str = ""
) -> tuple[Path, Data]:
    """Find a data file and compare it with the published ones.

    Args:
        source: A path, a file that comes with flowgrpo, or ``hf:owner/name:file`` for a file of a
            dataset on the hub.
        published: Beginnings of known hashes, as ``sha256:...`` or ``md5:...`` -> name.
        any_data: Whether a file with another hash is accepted.
        how: Where to get the file, for the message.

    Returns:
        The file on this machine, and its description.

    Raises:
        BenchError: If there is no such file, or it is not a published one.
    """
    if not source:
        raise BenchError(f"this benchmark needs its data: give --data PATH. {how}".rstrip())
    path = _download(source) if source.startswith(HUB) else _local(source, how)
    sha256, md5 = _hashes(path, path.stat().st_mtime_ns)
    name = next(
        (
            name
            for beginning, name in published.items()
            if f"sha256:{sha256}".startswith(beginning) or f"md5:{md5}".startswith(beginning)
        ),
        "",
    )
    notes: tuple[str, ...] = ()
    if published and not name:
        if not any_data:
            raise BenchError(
                f"{source} is none of the published files ({', '.join(published.values())}): its "
                f"SHA-256 is {sha256[:16]}…. Scores on it are not comparable; accept them with "
                "--set any_data=true"
            )
        notes = ("the prompts are not the published ones: scores are not comparable",)
    return path, Data(source, sha256, name, notes)


def _local(source: str, how: str) -> Path:
    try:
        return find(source)
    except FileNotFoundError as error:
        raise BenchError(f"{error}. {how}".rstrip(". ")) from error


def _download(source: str) -> Path:
    """A file of a dataset on the hub; one that was downloaded before needs no network."""
    from huggingface_hub import hf_hub_download

    repository, colon, file = source.removeprefix(HUB).partition(":")
    if not colon or not file:
        raise BenchError(f"{source}: write {HUB}owner/name:path/of/the/file")
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{source} cannot be downloaded: {error}") from error


@lru_cache(maxsize=16)
def _hashes(path: Path, _changed: int) -> tuple[str, str]:
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    Raises:
        BenchError: Naming the line that is no JSON object.
    """
    records = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise BenchError(f"{path}, line {number}: expected a JSON object, got {record!r}")
        records.append(record)
    return records


def require_model(model: str, option: str) -> None:
    """Check, before images are made, that a judge's model can be loaded. Nothing is downloaded.

    Args:
        model: A folder, or the hub id of a model of transformers.
        option: How another one is named, for the message.

    Raises:
        BenchError: If it is neither a folder nor in the hub's cache, and the hub does not have it or
            cannot be asked.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).expanduser().is_dir():
        return
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        HfApi().model_info(model, timeout=10)
    except HFValidationError as error:
        raise BenchError(f"the judge {model} is neither a folder nor the id of a model") from error
    # Without a network, each version of the hub's client and of its HTTP library raises errors of its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchError(
            f"the judge {model} is not here, and the hub does not give it ({reason}): 'hf download {model}' "
            f"where there is a network, or name a folder with {option}. Without a judge, 'flowgrpo bench "
            "generate' makes the images, and 'flowgrpo bench score FOLDER' judges them later"
        ) from error
