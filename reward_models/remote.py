"""A reward on another machine or in another environment, served by ``flowgrpo serve-reward``."""

import json
import logging
import os
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving.client import Endpoints, Refused
from flowgrpo.rewards.serving.protocol import pack, pack_prompts, unpack_problem, unpack_scores
from reward_models._parts import scored_in_parts

__all__ = ["Remote"]

log = logging.getLogger(__name__)

CHECKED_AT_ONCE = 1000


class Remote:
    """The scores of a reward server, or of several equal ones among which a batch is divided.

    The range is that of the reward served. Images travel as PNG, rounded to 8 bits, with their
    prompts, metadata and condition images. A server that is away, for instance to restart, is asked
    again for ``patience`` seconds while the others go on.

    NaN, and so a failed score, where the server's score is null, where a sample has pixels that are
    not finite, and where the reward refused the part of the batch that the sample was in.
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
            token_env: Environment variable that holds the token, if the servers ask for one. The
                token itself would end up in the run's ``config.toml``.
            timeout: Seconds that one attempt may take.
            patience: Seconds over which a request is tried again, the first one at the start too.
            concurrency: Requests under way at one server.
            part: Samples in one request.

        Raises:
            ValueError: If a server asks for another token or is no reward server, or an option is
                out of range.
            ConnectionError: If none of the servers answers.
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
        """Ask the reward that is served whether prompts say all that it needs.

        Raises:
            ValueError: If they do not.
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
            RuntimeError: If no part of the batch was scored; says why.
        """

        def ask(part: Tensor, owners: Sequence[Prompt]) -> list[float]:
            kind, body = pack(part, owners)
            return unpack_scores(self.endpoints.request("/score", kind, body), len(owners))

        return scored_in_parts(self.endpoints, media, prompts, self.part, ask)

    def _check(self, token_env: str) -> None:
        """Ask the servers who they are, so that a wrong token or address shows at once."""
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
            raise ValueError(f"the servers have different rewards: {names}")


def _reward_at(where: str, endpoints: Endpoints, token_env: str) -> str:
    """The name of the reward that is served."""
    token = f"the environment variable {token_env!r}" if token_env else "what token_env names"
    try:
        health = json.loads(endpoints.request("/healthz"))
    except Refused as error:
        if error.status == 401:
            raise ValueError(f"{error} (it is taken from {token})") from error
        raise ValueError(f"no reward server: {error}") from error
    except ValueError as error:
        raise ValueError(f"no reward server at {where}: {error}") from error
    if not isinstance(health, dict) or "status" not in health:
        raise ValueError(f"no reward server at {where}: /healthz says {health!r}")
    if "reward" not in health:
        raise ValueError(f"{where} asks for a token, which is taken from {token}")
    return str(health["reward"])
