"""Keys, tokens and passwords: how they are kept out of files and messages."""

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo.core.text import plain

REDACTED = "(redacted)"
"""Written in place of a secret."""
_WORDS = r"(?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|private[_-]?key|credentials?)"
_NAME = re.compile(rf"(?:.*[._-])?{_WORDS}|authorization", re.IGNORECASE)
"""Names whose values are secret: ``token``, ``hf_token``, ``openai_api_key``; not ``max_tokens``, and not
``token_env`` and ``api_key_env``, which name an environment variable."""
_TEXT_TOKENS = re.compile(
    r"(?:.*[._-])?(?:pad|bos|eos|unk|mask|sep|cls|special|image|video|stop|trigger|placeholder)_token",
    re.IGNORECASE,
)
"""Names of tokens that are parts of a text."""
_IN_TEXT: Sequence[tuple[re.Pattern[str], str]] = (
    # scheme://user:password@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{REDACTED}@"),
    # name=value in a URL, a command, a setting or TOML
    (
        re.compile(
            rf"((?:\b|[._-]){_WORDS}['\"]?\s*=\s*['\"]?)(?!\(redacted\))[^\s'\"&,;)}}\]]+",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    # "name": "value" in JSON and Python
    (
        re.compile(rf"(['\"](?:[^'\"\s]*[._-])?{_WORDS}['\"]\s*:\s*['\"])[^'\"]+", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(\bBearer\s+)[A-Za-z0-9][\w.~+/=-]*", re.IGNORECASE), rf"\1{REDACTED}"),
    # The forms of the keys of Hugging Face, OpenAI and GitHub.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-(?:proj-|ant-[a-z0-9]+-|or-v1-)?[A-Za-z0-9_]{20,}"
            r"|gh[pousr]_[A-Za-z0-9]{20,})"
        ),
        REDACTED,
    ),
)


def is_secret(name: str) -> bool:
    """Whether the value of an option of this name is a secret."""
    return bool(_NAME.fullmatch(name)) and not _TEXT_TOKENS.fullmatch(name)


def redact(text: str) -> str:
    """A text without passwords in URLs, values of secret names, bearer tokens and keys of known forms."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def redact_table(value: Any, name: str = "") -> Any:
    """Nested tables and lists without secrets: values of secret names, and :func:`redact` of all texts."""
    if isinstance(value, Mapping):
        return {k: redact_table(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_table(v, name) for v in value)
    if isinstance(value, str):
        return REDACTED if value and is_secret(name) else redact(value)
    return value


def redact_command(arguments: Sequence[str]) -> str:
    """A command as a shell takes it, without secrets."""
    shown, hidden = [], False
    for argument in arguments:
        shown.append(REDACTED if hidden else redact(argument))
        hidden = argument.startswith("--") and is_secret(argument.removeprefix("--"))
    return shlex.join(shown)


def redacted_in(value: Any, key: str = "") -> str:
    """The dotted key of a value that was redacted; empty if there is none."""
    if isinstance(value, Mapping):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return key if isinstance(value, str) and REDACTED in value else ""
    found = (redacted_in(inner, f"{key}.{k}".lstrip(".")) for k, inner in items)
    return next((k for k in found if k), "")


class _CleanRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return plain(redact(super().getMessage()))


def clean_logs() -> None:
    """Keep secrets, and control characters of prompts and servers, out of what this process logs."""
    logging.setLogRecordFactory(_CleanRecord)
