"""A reward that ``flowgrpo serve-reward`` serves from another machine or environment."""

import json
import logging
import math
import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving.client import Endpoints, Refused
from flowgrpo.rewards.serving.protocol import pack, pack_prompts, unpack_problem, unpack_scores

__all__ = ["Remote"]

log = logging.getLogger(__name__)

CHECKED_AT_ONCE = 1000


class Remote:
    """The scores of a reward server, or of several equal servers that share each batch.

    The range is that of the served reward. Images are sent as PNG, rounded to 8 bits, with prompts,
    metadata and condition images. A server that does not answer, for instance because it restarts,
    is tried again for ``patience`` seconds, while the other servers continue.

    A score is NaN, and so counts as failed, if the server's score is null, if the sample has pixels
    that are not finite, or if the reward raised an error on the request that held the sample.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        token_env: str = "FLOWGRPO_TOKEN",
        timeout: float = 120.0,
        patience: float = 300.0,
        concurrency: int = 2,
        part: int = 16,
    ):
        """
        Args:
            url: One server or several, such as ``http://127.0.0.1:8500``.
            token_env: Environment variable that holds the token, if the servers require one. The
                token itself must not be in the configuration, which is saved with the run.
            timeout: Seconds that one attempt may take.
            patience: Seconds over which a request is tried again before it fails.
            concurrency: Most requests in progress at one server.
            part: Samples in one request.

        Raises:
            ValueError: If a server requires another token or is not a reward server, or an option
                is out of range.
            ConnectionError: If no server answers.
            ImportError: If httpx is not installed.
        """
        if part < 1:
            raise ValueError(f"part must be at least 1, got {part}")
        token = os.environ.get(token_env, "") if token_env else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.endpoints = Endpoints(
            url, headers=headers, timeout=timeout, patience=patience, concurrency=concurrency
        )
        self.part = part
        self._check(token_env)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check prompts with the served reward.

        Raises:
            ValueError: If they lack something that it needs.
        """
        for start in range(0, len(prompts), CHECKED_AT_ONCE):
            body = pack_prompts(prompts[start : start + CHECKED_AT_ONCE])
            answer = self.endpoints.request("/check", "application/json", body)
            if problem := unpack_problem(answer):
                raise ValueError(problem)

    def __call__(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            RuntimeError: If no sample of the batch was scored; names the first error.
        """
        scores = torch.full((len(prompts),), math.nan)
        # Only finite media are sent; each element holds the rows of one request.
        parts = media.isfinite().flatten(1).all(1).nonzero().squeeze(1).split(self.part)

        def ask(index: int) -> list[float]:
            rows = parts[index]
            kind, body = pack(media[rows], [prompts[int(r)] for r in rows])
            return unpack_scores(self.endpoints.request("/score", kind, body), len(rows))

        answers = self.endpoints.ask_all(len(parts), ask)
        errors = [a for a in answers if isinstance(a, Exception)]
        if errors and len(errors) == len(answers):
            raise RuntimeError(f"the reward server failed: {errors[0]}") from errors[0]
        for rows, answer in zip(parts, answers, strict=True):
            if isinstance(answer, Exception):
                log.warning("%d of %d samples have no score: %s", len(rows), len(prompts), answer)
            else:
                scores[rows] = torch.tensor(answer)
        return scores

    def _check(self, token_env: str) -> None:
        """Ask all servers for their reward, so that a wrong token or address is found at the start."""
        names = {}
        for url in self.endpoints.urls:
            one = Endpoints(url, headers=self.endpoints.headers, timeout=10.0, patience=0.0)
            try:
                names[url] = _reward_at(url, one, token_env)
            except ConnectionError as error:
                log.warning("%s", error)
        if not names:
            names["any"] = _reward_at(", ".join(self.endpoints.urls), self.endpoints, token_env)
        if len(set(names.values())) != 1:
            raise ValueError(f"the servers serve different rewards: {names}")


def _reward_at(where: str, endpoints: Endpoints, token_env: str) -> str:
    """The name of the served reward, from ``/healthz``."""
    token = f"the environment variable {token_env!r}" if token_env else "what token_env names"
    try:
        health = json.loads(endpoints.request("/healthz"))
    except Refused as error:
        if error.status == 401:
            raise ValueError(f"{error} (the token is read from {token})") from error
        raise ValueError(f"not a reward server: {error}") from error
    except ValueError as error:
        raise ValueError(f"not a reward server at {where}: {error}") from error
    if not isinstance(health, dict) or "status" not in health:
        raise ValueError(f"not a reward server at {where}: /healthz answers {health!r}")
    if "reward" not in health:
        raise ValueError(f"{where} requires a token, which is read from {token}")
    return str(health["reward"])
