"""What benchmarks have in common whose judge is a model behind an OpenAI-compatible endpoint."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flowgrpo.bench.base import BenchError, Failure, Json, Judged, Picture
from flowgrpo.bench.chat import ChatModel, Server
from flowgrpo.bench.judging import in_flight
from flowgrpo.core.text import counted

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """The settings of a judge behind an endpoint; a benchmark inherits them."""

    judge_model: str = ""
    """The judge, as its server calls it; ``bench list`` names the published one."""
    judge_url: str | Sequence[str] = "http://127.0.0.1:8000/v1"
    """One or several OpenAI-compatible servers."""
    judge_key_env: str = ""
    """Environment variable with the key; empty for none."""
    concurrency: int = 32
    """Images in flight at each server."""
    attempts: int = 3
    """Answers to ask for before an image counts as failed."""
    timeout: float = 180.0
    """Seconds that one request may take."""
    patience: float = 300.0
    """Seconds over which a request is tried again while the server is away."""
    cache: str = ""
    """Folder for answers that several benchmark folders share."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More keys of each request, such as ``temperature``, which is 0 otherwise."""


class Unusable(Exception):
    """A picture has no judgement, because the judge's answers cannot be used."""


class EndpointJudge:
    """Asks a server about each picture; what is asked and how it is read is the subclass's.

    A subclass implements :meth:`judgement`, :attr:`notes` and :meth:`wording`.
    """

    kind = ""
    """The name of the rule, part of the identity."""

    def __init__(self, settings: EndpointSettings, needs: str):
        """
        Args:
            settings: The benchmark.
            needs: What to give as the judge, for the message.

        Raises:
            BenchError: If no judge is named, or its server refuses the key or has no such model.
        """
        if not settings.judge_model:
            raise BenchError(
                f"no judge is named: {needs}; docs/benchmarks.md says how to start one"
            )
        if settings.attempts < 1 or settings.concurrency < 1:
            raise BenchError("attempts and concurrency must be at least 1")
        self.settings = settings
        self.model = ChatModel(
            Server(
                model=settings.judge_model,
                url=settings.judge_url,
                key_env=settings.judge_key_env,
                concurrency=settings.concurrency,
                timeout=settings.timeout,
                patience=settings.patience,
                cache=settings.cache,
                extra=self.extra(),
            )
        )

    def extra(self) -> Mapping[str, Any]:
        """More keys of each request."""
        return self.settings.extra

    @property
    def title(self) -> str:
        """The judge's name."""
        return self.settings.judge_model.rsplit("/", 1)[-1]

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the official judge."""
        return ()

    def wording(self) -> Json:
        """Everything in the questions that decides the answers: texts or their hash, image format."""
        raise NotImplementedError

    def identity(self) -> Json:
        """Rule, model, wording and decoding."""
        return {
            "judge": self.kind,
            "model": self.settings.judge_model,
            **self.wording(),
            "request": {"temperature": 0, **self.extra()},
        }

    def version(self) -> str:
        """Model and version as the servers report them."""
        return self.model.version()

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """The judgement of each picture, many at once."""
        servers = len(self.model.server.urls)
        return in_flight(pictures, self.settings.concurrency * servers, self._one)

    def _one(self, picture: Picture) -> Json | Failure:
        try:
            return self.judgement(picture)
        except (Unusable, BenchError, RuntimeError, OSError) as error:
            return Failure(str(error))

    def judgement(self, picture: Picture) -> Json:
        """The judgement of one picture, from answers of :meth:`ask`.

        Raises:
            Unusable: If the judge gives no usable answer.
        """
        raise NotImplementedError

    def ask(
        self,
        content: Sequence[str | bytes],
        parse: Callable[[str], T | None],
        max_tokens: int,
        system: str = "",
    ) -> T:
        """The parsed answer to one question; asked again while it cannot be parsed.

        Raises:
            Unusable: After ``attempts`` answers that cannot be parsed.
        """
        for _ in range(self.settings.attempts):
            found = self.model.ask(content, parse, max_tokens, system)
            if found is not None:
                return found
        raise Unusable(f"no usable answer in {counted(self.settings.attempts, 'attempt')}")


def named_note(model: str, published: Sequence[str]) -> tuple[str, ...]:
    """The note on a judge that is none of the published ones."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    if any(name == p.rsplit("/", 1)[-1].lower() for p in published):
        return ()
    return (
        f"{model} is not the published judge ({', '.join(published)}): scores are not comparable "
        "with published ones",
    )
