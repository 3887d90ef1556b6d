"""Models that see pictures, behind an OpenAI-compatible endpoint: vLLM, SGLang or a cloud."""

import base64
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flowgrpo.rewards.serving.client import Endpoints, Refused
from reward_models.shared.templates import Content

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: All of it.
        first: Probability of each token that the answer could have begun with, the most likely 20;
            empty if it was not asked for.
    """

    text: str
    first: Mapping[str, float] = field(default_factory=dict)

    def share(self, words: Sequence[str]) -> list[float] | None:
        """How the first token's probability divides among words, over all their spellings.

        None if less than half of the probability is on them: then the model was about to say
        something else, and their ratio means nothing.
        """
        masses = dict.fromkeys(words, 0.0)
        for token, probability in self.first.items():
            # Tokenizers mark blanks as U+2581 or U+0120.
            word = token.strip(" \n\t\u2581\u0120\"'*.,:!()").lower()
            if word in masses:
                masses[word] += probability
        mass = sum(masses.values())
        return [m / mass for m in masses.values()] if mass >= 0.5 else None


class Chat:
    """Asks many questions at a time and keeps the answers.

    An answer that cannot be parsed is no answer: it is counted, logged, not kept and never replaced
    by a number.

    Attributes:
        asked: Requests that were answered by a server.
        cached: Answers found on disk instead.
        unparsed: Answers that were of no use.
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
            model: As the server calls it.
            base_url: One server or several equal ones, such as ``http://127.0.0.1:8000/v1``.
            api_key_env: Environment variable that holds the key; empty for none.
            timeout: Seconds that one attempt may take.
            patience: Seconds over which a question is asked again, with growing pauses.
            concurrency: Questions under way at one server.
            cache: Folder for answers, by pictures, prompt, template, model and settings; empty keeps
                none.
            extra: More keys of the request, such as ``chat_template_kwargs``.

        Raises:
            ValueError: If the variable is not set, the key is refused, or the server does not have
                the model.
        """
        headers = {}
        if api_key_env:
            key = os.environ.get(api_key_env, "")
            if not key:
                raise ValueError(f"api_key_env: the environment variable {api_key_env!r} is empty")
            headers["Authorization"] = f"Bearer {key}"
        self.model, self.extra = model, dict(extra or {})
        self.cache = Path(cache) if cache else None
        self.endpoints = Endpoints(
            base_url, headers=headers, timeout=timeout, patience=patience, concurrency=concurrency
        )
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
    ) -> list[T | None]:
        """The parsed answers, in order; None where there is none.

        Args:
            questions: Text and pictures.
            parse: Returns None for an answer of no use.
            max_tokens: Longest answer.
            first: Whether to ask for the probabilities of the first token.

        Raises:
            RuntimeError: If no question at all could be asked; says why.
        """
        payloads = [self._payload(q, max_tokens, first) for q in questions]
        found = self.endpoints.ask_all(len(payloads), lambda i: self._ask(payloads[i], parse))
        errors = [f for f in found if isinstance(f, Exception)]
        if errors and len(errors) == len(found):
            raise RuntimeError(f"the judge {self.model!r} failed: {errors[0]}") from errors[0]
        if errors:
            log.warning("%d of %d questions failed: %s", len(errors), len(found), errors[0])
        return [None if isinstance(f, Exception) else f for f in found]

    def _payload(self, question: Content, max_tokens: int, first: bool) -> dict[str, Any]:
        content = [_part(c) for c in question]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": max_tokens,
            "temperature": 0,
            **({"logprobs": True, "top_logprobs": 20} if first else {}),
            **self.extra,
        }

    def _ask(self, payload: Mapping[str, Any], parse: Callable[[Answer], T | None]) -> T | None:
        # The request holds all that decides the answer: pictures, text, model and settings.
        body = json.dumps(payload, sort_keys=True).encode()
        name = hashlib.sha256(body).hexdigest()
        kept = self._kept(name)
        value = None if kept is None else parse(kept)
        if value is not None:
            self._count("cached")
            return value
        raw = self.endpoints.request("/chat/completions", "application/json", body)
        self._count("asked")
        answer = _answer(raw)
        value = None if answer is None else parse(answer)
        if answer is None or value is None:
            self._count("unparsed")
            said = raw[:200] if answer is None else answer.text[-200:] or str(answer.first)[:200]
            log.warning("an answer of %r cannot be parsed: %r", self.model, said)
            return None
        self._keep(name, answer)
        return value

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)

    def _place(self, name: str) -> Path:
        assert self.cache is not None
        return self.cache / name[:2] / f"{name[2:]}.json"

    def _kept(self, name: str) -> Answer | None:
        if self.cache is None:
            return None
        try:
            record = json.loads(self._place(name).read_text())
            return Answer(record["text"], record["first"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # a damaged file is as good as none: the question is asked again

    def _keep(self, name: str, answer: Answer) -> None:
        if self.cache is None:
            return
        place = self._place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may share the folder, and may be killed.
        temporary = place.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps({"text": answer.text, "first": dict(answer.first)}))
        temporary.replace(place)

    def _check(self) -> None:
        """Find a wrong key or model name now. A server that is away is asked when it is needed:
        answers may all be on disk."""
        for url in self.endpoints.urls:
            one = Endpoints(url, headers=self.endpoints.headers, timeout=10.0, patience=0.0)
            try:
                listed = json.loads(one.request("/models"))["data"]
                names = [m["id"] for m in listed]
            except ConnectionError as error:
                log.warning("%s", error)
            except Refused as error:
                if error.status in (401, 403):
                    raise ValueError(f"the key is refused: {error}") from error
            except (ValueError, KeyError, TypeError):
                log.warning("%s/models does not list its models", url)
            else:
                if self.model not in names:
                    raise ValueError(f"{url} has no model {self.model!r}; it has {names[:20]}")


def _part(content: str | bytes) -> dict[str, Any]:
    if isinstance(content, str):
        return {"type": "text", "text": content}
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _answer(raw: bytes) -> Answer | None:
    """The answer in a response; None if it has not the form of one."""
    try:
        choice = json.loads(raw)["choices"][0]
        text = choice["message"].get("content") or ""
        # Servers that part reasoning from the answer may still have both.
        listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs", [])
        first: dict[str, float] = {}
        for entry in listed:
            token, probability = entry["token"], math.exp(entry["logprob"])
            first[token] = first.get(token, 0.0) + probability
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return None
    return Answer(text, first) if isinstance(text, str) else None
