"""Questions to vision-language models behind an OpenAI-compatible endpoint: vLLM, SGLang or a cloud.

Requests go through the ``openai`` client. It is given an httpx client of ours, so that redirects,
proxies, timeouts and the size of answers follow the same rules as for reward servers; its own
retries are off, because :class:`~flowgrpo.rewards.serving.client.Endpoints` retries across several
servers.
"""

import base64
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

try:
    import httpx
    import openai
except ModuleNotFoundError as error:
    raise ImportError(
        "judges behind an endpoint need the openai client: pip install 'flowgrpo[judge]'"
    ) from error

from flowgrpo.data import strict_json
from flowgrpo.rewards.serving.client import RETRIED, Endpoints, Refused, Unavailable, retry_after
from flowgrpo.rewards.serving.protocol import unpack_error
from reward_models.shared.answers import Answer
from reward_models.shared.templates import Content

log = logging.getLogger(__name__)

T = TypeVar("T")

STANDARD = (
    "model", "messages", "max_completion_tokens", "temperature", "logprobs", "top_logprobs",
    "top_p", "seed",
)  # fmt: skip
"""Keys of a request that the openai client knows; the others go into its extra body."""
CHECK_SECONDS = 10.0
"""How long the list of a server's models may take at the start."""


class Chat:
    """Asks many questions in parallel and caches the answers on disk.

    An answer that cannot be parsed is counted, logged and not cached; it is never replaced by a
    number.

    Attributes:
        asked: Questions that a server answered.
        cached: Questions that the cache answered.
        unparsed: Answers that could not be parsed.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str],
        api_key_env: str,
        timeout: float,
        patience: float,
        concurrency: int,
        cache: str,
        extra: Mapping[str, Any] | None,
    ):
        """
        Args:
            model: Name of the model at the server.
            base_url: One server or several equal ones, such as ``http://127.0.0.1:8000/v1``.
            api_key_env: Environment variable that holds the key; empty for none.
            timeout: Seconds that one attempt may take.
            patience: Seconds over which a question is tried again, with growing pauses.
            concurrency: Most questions in progress at one server.
            cache: Folder for answers, keyed by pictures, prompt, template, model and settings;
                empty for no cache.
            extra: Further keys of the request, such as ``chat_template_kwargs``.

        Raises:
            ValueError: If the variable is not set, the key is refused, or the server does not have
                the model.
            ImportError: If the openai client is not installed.
        """
        headers = {}
        key = os.environ.get(api_key_env, "") if api_key_env else ""
        if api_key_env:
            if not key:
                raise ValueError(f"api_key_env: the environment variable {api_key_env!r} is empty")
            headers["Authorization"] = f"Bearer {key}"
        self.model, self.extra = model, dict(extra or {})
        self.cache = Path(cache) if cache else None
        self.endpoints = Endpoints(
            base_url, headers=headers, timeout=timeout, patience=patience, concurrency=concurrency
        )
        self._clients = {
            url: _openai_client(url, key, client, timeout)
            for url, client in self.endpoints.clients.items()
        }
        self.asked, self.cached, self.unparsed = 0, 0, 0
        self._lock = threading.Lock()
        self._check()

    def ask_all(
        self,
        questions: Sequence[Content],
        parse: Callable[[Answer], T | None],
        *,
        max_tokens: int,
        first: bool = False,
        system: str = "",
        begins: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> list[T | None]:
        """Ask questions and parse the answers; the results are in order, None where there is none.

        Args:
            questions: Text and pictures.
            parse: Returns None for an answer that cannot be used.
            max_tokens: Longest answer.
            first: Whether to request the probabilities of the first token.
            system: Text of the system message; empty for none.
            begins: Beginning of the answer, which the model continues; empty for none.
            settings: Keys of the request that replace the usual ones, such as ``temperature``.

        Raises:
            RuntimeError: If every question failed; names the first error.
        """
        payloads = [
            self._payload(q, max_tokens, first, system, begins) | dict(settings or {})
            for q in questions
        ]
        found = self.endpoints.ask_all(len(payloads), lambda i: self._ask(payloads[i], parse))
        errors = [f for f in found if isinstance(f, Exception)]
        if errors and len(errors) == len(found):
            raise RuntimeError(f"the judge {self.model!r} failed: {errors[0]}") from errors[0]
        if errors:
            log.warning("%d of %d questions failed: %s", len(errors), len(found), errors[0])
        return [None if isinstance(f, Exception) else f for f in found]

    def _payload(
        self, question: Content, max_tokens: int, first: bool, system: str, begins: str
    ) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [_part(c) for c in question]})
        if begins:
            messages.append({"role": "assistant", "content": begins})
        return {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": max_tokens,
            "temperature": 0,
            **({"logprobs": True, "top_logprobs": 20} if first else {}),
            **({"continue_final_message": True, "add_generation_prompt": False} if begins else {}),
            **self.extra,
        }

    def _ask(self, payload: Mapping[str, Any], parse: Callable[[Answer], T | None]) -> T | None:
        # The request determines the answer: it holds pictures, text, model and settings.
        body = json.dumps(payload, sort_keys=True).encode()
        name = hashlib.sha256(body).hexdigest()
        kept = self._read(name)
        value = None if kept is None else parse(kept)
        if value is not None:
            self._count("cached")
            return value
        raw = self.endpoints.call(lambda url: self._complete(url, payload))
        self._count("asked")
        answer = _answer(raw)
        value = None if answer is None else parse(answer)
        if answer is None or value is None:
            self._count("unparsed")
            shown = raw[:200] if answer is None else answer.text[-200:] or str(answer.first)[:200]
            log.warning("an answer of %r cannot be parsed: %r", self.model, shown)
            return None
        self._write(name, answer)
        return value

    def _complete(self, url: str, payload: Mapping[str, Any]) -> bytes:
        """One attempt at one server; the answer as it came, because servers differ in its details."""
        known = {k: v for k, v in payload.items() if k in STANDARD and k not in self.extra}
        others = {k: v for k, v in payload.items() if k not in known}
        try:
            response = self._clients[url].chat.completions.with_raw_response.create(
                **known, extra_body=others
            )
        except openai.APIStatusError as error:
            message = f"status {error.status_code}: {unpack_error(error.response.content)}"
            if error.status_code in RETRIED:
                raise Unavailable(message, retry_after(error.response.headers)) from error
            raise Refused(error.status_code, f"{url}/chat/completions: {message}") from error
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, Refused):  # an answer beyond the limit
                raise error.__cause__ from None
            raise Unavailable(str(error.__cause__ or error)) from error
        return response.http_response.content

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)

    def _place(self, name: str) -> Path:
        assert self.cache is not None
        return self.cache / name[:2] / f"{name[2:]}.json"

    def _read(self, name: str) -> Answer | None:
        """An answer from the cache; a damaged file counts as none, and the question is asked again."""
        if self.cache is None:
            return None
        try:
            record = json.loads(self._place(name).read_text())
            return Answer(record["text"], record["first"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _write(self, name: str, answer: Answer) -> None:
        if self.cache is None:
            return
        place = self._place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Written atomically: several processes may share the folder, and any of them may be killed.
        temporary = place.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(strict_json.dumps({"text": answer.text, "first": dict(answer.first)}))
        temporary.replace(place)

    def _check(self) -> None:
        """Find a wrong key or model name at the start. A server that does not answer is skipped: all
        answers may be in the cache."""
        for url, client in self._clients.items():
            try:
                response = client.models.with_raw_response.list(timeout=CHECK_SECONDS)
                names = [m["id"] for m in json.loads(response.http_response.content)["data"]]
            except openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    message = unpack_error(error.response.content)
                    raise ValueError(
                        f"the key is refused: {url}/models: status {error.status_code}: {message}"
                    ) from error
                log.warning("%s/models: status %d", url, error.status_code)
            except openai.APIConnectionError as error:
                log.warning("%s does not answer: %s", url, error.__cause__ or error)
            except (ValueError, KeyError, TypeError):
                log.warning("%s/models does not list its models", url)
            else:
                if self.model not in names:
                    raise ValueError(f"{url} has no model {self.model!r}; it has {names[:20]}")


def _openai_client(url: str, key: str, client: httpx.Client, timeout: float) -> openai.OpenAI:
    """The openai client of one server, over our httpx client, without retries of its own."""

    def remove_headers(request: httpx.Request) -> None:
        """Send no description of this machine, no organisation of another account, no made-up key."""
        for name in list(request.headers):
            # The client reads its own header "raw-response" back from the request.
            if name.startswith(("x-stainless-", "openai-")) and "raw-response" not in name:
                del request.headers[name]
        if not key:
            request.headers.pop("authorization", None)

    client.event_hooks["request"].append(remove_headers)
    # Typed for httpx or its successor httpx2, as the version of openai has it; it accepts both.
    any_client: Any = client
    return openai.OpenAI(
        base_url=url, api_key=key or "none", http_client=any_client, timeout=timeout, max_retries=0
    )


def _part(content: str | bytes) -> dict[str, Any]:
    if isinstance(content, str):
        return {"type": "text", "text": content}
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _answer(raw: bytes) -> Answer | None:
    """The answer in a response body; None if the body is not a chat completion."""
    try:
        choice = json.loads(raw)["choices"][0]
        text = choice["message"].get("content") or ""
        # Servers that separate reasoning from the answer may still return both.
        listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs", [])
        first: dict[str, float] = {}
        for entry in listed:
            token, probability = entry["token"], math.exp(entry["logprob"])
            first[token] = first.get(token, 0.0) + probability
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return None
    return Answer(text, first) if isinstance(text, str) else None
