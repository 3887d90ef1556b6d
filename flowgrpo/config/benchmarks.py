"""Benchmarks that are run at evaluations, the tables ``[[evaluation.bench]]``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flowgrpo.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark of ``flowgrpo bench``, or a part of it, that is run at evaluations.

    All processes make and judge their share of the images. The sampler is that of the evaluations.
    """

    name: str
    """A benchmark that ``flowgrpo bench list`` shows, or the import path of one of your own,
    ``"package.module:Name"``."""
    label: str = ""
    """Its name in logs, paths and reports; by default the last part of ``name``."""
    when: Literal["every", "ends", "final"] = "ends"
    """At ``every`` evaluation, at both ``ends`` of training, or only after training (``final``)."""
    limit: int = 0
    """Number of prompts, spread evenly over the benchmark; 0 for all. The result of a part is not the
    benchmark's score."""
    dimensions: tuple[str, ...] = ()
    """Only prompts of these tasks or test points."""
    keep_images: bool = False
    """Keep the images after they are judged. Otherwise they are deleted; a few stay in the page."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the benchmark, among them those of its data and its judge; ``flowgrpo bench list
    NAME`` shows them."""

    @property
    def tag(self) -> str:
        """The name in logs, paths and reports."""
        return self.label or self.name.rsplit(":", 1)[-1].rsplit(".", 1)[-1]


def check_benchmarks(benches: Sequence[Bench]) -> None:
    """Check the benchmarks of a configuration, as far as that is possible without loading them.

    Raises:
        ConfigError: If two share a name, or a name or a limit is not allowed.
    """
    tags = [b.tag for b in benches]
    for index, bench in enumerate(benches):
        key, tag = f"evaluation.bench[{index}]", bench.tag
        if not tag or not all(c.isalnum() or c in "_-" for c in tag) or tag == "reward":
            raise ConfigError(
                f"{key}.label must consist of letters, digits, '_' and '-', and must not be 'reward', "
                f"got {tag!r}"
            )
        if tag in tags[:index]:
            raise ConfigError(f"{key}: there are two benchmarks {tag!r}; give one a label")
        if bench.limit < 0:
            raise ConfigError(f"{key}.limit must be at least 0, got {bench.limit}")
