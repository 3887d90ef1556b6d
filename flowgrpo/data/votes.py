"""Votes of people on pairs of pictures, and the folder that holds them.

A folder of votes contains ``ballot.json`` (the pairs, and where their pictures come from), ``pictures/``
(copies of the pictures, named by their digests), ``votes.jsonl`` (one line per vote, only ever appended to)
and ``pairs.jsonl`` (the preferences, as ``flowgrpo learn-rubrics`` reads them).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from flowgrpo.data import strict_json
from flowgrpo.data.files import append, reached, replacing, sync, write_whole

FORMAT = 1
BALLOT, VOTES, PAIRS, PICTURES = "ballot.json", "votes.jsonl", "pairs.jsonl", "pictures"

Choice = Literal["first", "second", "tie", "skip"]
CHOICES: tuple[str, ...] = get_args(Choice)
VALUES: Mapping[str, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""The share of a win that the first picture gets; ``skip`` is no verdict."""


@dataclass(frozen=True)
class Shown:
    """One picture of a pair.

    Attributes:
        source: Where it comes from: the name of a run, a folder or a column of a grid.
        file: Its name in the folder ``pictures``, which is its digest.
    """

    source: str
    file: str


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt."""

    prompt: str
    first: Shown
    second: Shown


@dataclass(frozen=True)
class Vote:
    """The verdict of one voter on one pair.

    Attributes:
        pair: Number of the pair in the ballot.
        voter: Name of the voter.
        choice: Which picture is better, ``tie`` or ``skip``.
    """

    pair: int
    voter: str
    choice: Choice


@dataclass(frozen=True)
class Ballot:
    """The pairs that are voted on.

    Attributes:
        folder: The folder of the votes.
        seed: Decides which picture of a pair is shown on the left, together with the voter's name.
        pairs: The pairs, in the order in which they are shown.
    """

    folder: Path
    seed: int
    pairs: Sequence[Pair]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pairs and the seed."""
        body = json.dumps([self.seed, [asdict(p) for p in self.pairs]], sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def sources(self) -> list[str]:
        """The names of all sources, in the order in which they first appear."""
        return list(dict.fromkeys(s.source for p in self.pairs for s in (p.first, p.second)))

    def picture(self, shown: Shown) -> Path:
        """The file of a picture."""
        return self.folder / PICTURES / shown.file

    def first_is_left(self, pair: int, voter: str) -> bool:
        """Whether a voter sees the first picture of a pair on the left."""
        text = f"{self.seed}\n{pair}\n{voter}"
        return hashlib.sha256(text.encode()).digest()[0] % 2 == 0

    def write(self) -> None:
        """Write ``ballot.json``."""
        body = {
            "format": FORMAT,
            "digest": self.digest,
            "seed": self.seed,
            "pairs": [asdict(p) for p in self.pairs],
        }
        write_whole(self.folder / BALLOT, strict_json.dumps(body, indent=1, ensure_ascii=False))


def is_ballot(path: Path) -> bool:
    """Whether a path is a folder of votes, or the file of votes in one."""
    return (path / BALLOT).is_file() or (path.name == VOTES and path.is_file())


def file_name(picture: Image.Image) -> str:
    """The name of a picture in the folder ``pictures``."""
    return f"{pixel_digest(picture)[:32]}.png"


def save_picture(folder: Path, picture: Image.Image) -> None:
    """Copy a picture into a folder of votes, without its metadata."""
    plain = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes())
    path = folder / PICTURES / file_name(plain)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            plain.save(temporary, "PNG")


def pixel_digest(picture: Image.Image) -> str:
    """SHA-256 of the size and the pixels of a picture, whatever file holds it."""
    size = "x".join(map(str, picture.size)).encode()
    return hashlib.sha256(size + b"\n" + picture.convert("RGB").tobytes()).hexdigest()


def read_ballot(folder: Path, check_pictures: bool = True) -> Ballot:
    """Read ``ballot.json``, and check that the pictures are those that were voted on.

    Raises:
        FileNotFoundError: If the folder has no ballot, or a picture is missing.
        ValueError: If the ballot is damaged or of a newer version, or a picture was changed.
    """
    path = folder / BALLOT
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no folder of votes: it has no {BALLOT}; 'flowgrpo vote' makes one"
        )
    try:
        body = json.loads(path.read_text("utf-8"))
        version = int(body["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): take it from a backup") from error
    if version > FORMAT:
        raise ValueError(
            f"{path} was written by a newer version of flowgrpo (format {version}, this one reads {FORMAT}): "
            "update flowgrpo"
        )
    try:
        pairs = [
            Pair(str(p["prompt"]), Shown(**p["first"]), Shown(**p["second"])) for p in body["pairs"]
        ]
        ballot = Ballot(folder, int(body["seed"]), pairs)
        if body["digest"] != ballot.digest:
            raise ValueError("its digest differs")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): take it from a backup") from error
    if check_pictures:
        _check_pictures(ballot)
    return ballot


def _check_pictures(ballot: Ballot) -> None:
    for file in {s.file for p in ballot.pairs for s in (p.first, p.second)}:
        # The name is part of a path, so it must not lead out of the folder.
        path = ballot.folder / PICTURES / Path(file).name
        if path.name != file or not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, on which people voted: restore it, or vote again"
            )
        try:
            with Image.open(path) as picture:
                same = file_name(picture) == path.name
        except (OSError, SyntaxError, Image.DecompressionBombError):
            same = False
        if not same:
            raise ValueError(
                f"{path} was changed since people voted on it: restore it, or vote again with another --out"
            )


class VoteBook:
    """The votes of a folder.

    Args:
        ballot: The pairs.

    Raises:
        ValueError: If ``votes.jsonl`` is damaged, belongs to another ballot, or is of a newer version.
    """

    def __init__(self, ballot: Ballot):
        self.ballot = ballot
        self.path = ballot.folder / VOTES
        self._votes: dict[tuple[str, int], Vote] = {}
        for record in self._records():
            self._apply(record)

    @property
    def votes(self) -> list[Vote]:
        """The votes that count, in the order in which they were cast."""
        return list(self._votes.values())

    def of(self, voter: str) -> dict[int, Vote]:
        """The votes of one voter, by the number of the pair."""
        return {pair: v for (name, pair), v in self._votes.items() if name == voter}

    def add(self, vote: Vote, left: str, seconds: float | None = None) -> None:
        """Append a vote and wait until it is on the disk.

        Args:
            vote: The vote.
            left: ``first`` or ``second``: which picture was on the left.
            seconds: Time that the voter took.
        """
        record = {"pair": vote.pair, "choice": vote.choice, "voter": vote.voter, "left": left}
        self._append(record | ({} if seconds is None else {"seconds": round(seconds, 2)}))

    def undo(self, voter: str) -> int | None:
        """Take back the last vote of a voter; returns its pair, or None if there is none."""
        last = next((v for v in reversed(self.votes) if v.voter == voter), None)
        if last is None:
            return None
        self._append({"undo": last.pair, "voter": voter})
        return last.pair

    def write_pairs(self) -> None:
        """Write the preferences as pairs for ``flowgrpo learn-rubrics``; ties and skips are left out."""
        lines = []
        for vote in self.votes:
            if vote.choice in ("first", "second"):
                pair = self.ballot.pairs[vote.pair]
                files = [f"{PICTURES}/{s.file}" for s in (pair.first, pair.second)]
                if vote.choice == "second":
                    files.reverse()
                lines.append({"prompt": pair.prompt, "preferred": files[0], "other": files[1]})
        text = "".join(strict_json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(self.ballot.folder / PAIRS, text)

    def repair(self) -> None:
        """Remove a last line that was cut off, so that the next vote begins a line of its own."""
        if self.path.is_file():
            found = self.path.read_bytes()
            whole = found[: found.rfind(b"\n") + 1]
            if whole != found:
                reached("write", self.path)
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))

    def _append(self, record: Mapping[str, Any]) -> None:
        if not self.path.exists():
            append(self.path, {"format": FORMAT, "ballot": self.ballot.digest})
            sync(self.path.parent)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append(self.path, {**record, "at": now})
        sync(self.path)
        self._apply(record)

    def _apply(self, record: Mapping[str, Any]) -> None:
        if "undo" in record:
            self._votes.pop((str(record["voter"]), int(record["undo"])), None)
            return
        vote = Vote(int(record["pair"]), str(record["voter"]), record["choice"])
        if vote.choice not in CHOICES or not 0 <= vote.pair < len(self.ballot.pairs):
            raise ValueError(f"no such choice or pair: {vote}")
        key = (vote.voter, vote.pair)
        self._votes.pop(key, None)  # so that a vote cast again is the last one
        self._votes[key] = vote

    def _records(self) -> Iterable[Mapping[str, Any]]:
        """The lines after the first one. A last line that was cut off by an interruption is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text("utf-8").split("\n")[:-1]
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._check_header(record)
                else:
                    _check_record(record, len(self.ballot.pairs))
                    records.append(record)
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({error!r}): remove the line"
                ) from error
        return records

    def _check_header(self, header: Mapping[str, Any]) -> None:
        if header["format"] > FORMAT:
            raise ValueError(
                f"{self.path} was written by a newer version of flowgrpo (format {header['format']}, this one "
                f"reads {FORMAT}): update flowgrpo"
            )
        if header["ballot"] != self.ballot.digest:
            raise ValueError(
                f"{self.path} has votes from another folder, on other pairs than those of "
                f"{self.ballot.folder / BALLOT}: put it back beside its own {BALLOT}"
            )


def _check_record(record: Mapping[str, Any], pairs: int) -> None:
    """Raise KeyError or TypeError if a line is no vote and no undo."""
    number = record["undo"] if "undo" in record else record["pair"]
    if not isinstance(record["voter"], str) or not isinstance(number, int):
        raise TypeError("a voter is a text, and a pair is a number")
    if not 0 <= number < pairs or ("pair" in record and record["choice"] not in CHOICES):
        raise KeyError("no such pair or choice")


def read_votes(path: Path) -> tuple[Ballot, list[Vote]]:
    """The pairs and the votes of a folder, or of the file ``votes.jsonl`` in it.

    Raises:
        FileNotFoundError: If there are none, or a picture is missing.
        ValueError: If they are damaged, of a newer version, or do not belong together; if a picture was
            changed.
    """
    folder = path.parent if path.name == VOTES else path
    ballot = read_ballot(folder)
    votes = VoteBook(ballot).votes
    if not votes:
        raise ValueError(f"{folder} has no votes yet: run 'flowgrpo vote --out {folder}'")
    return ballot, votes
