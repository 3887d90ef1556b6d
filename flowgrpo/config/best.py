"""Checks of the numbers that decide which weights are kept, and when a run ends."""

from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest
from flowgrpo.core.measures import ARTEFACTS, MEASURES, Measured
from flowgrpo.core.text import counted


def check_best(config: Any) -> None:
    """Check ``evaluation.best``, ``evaluation.keep_best`` and ``train.early_stopping`` of a configuration.

    Raises:
        ConfigError: If no evaluation has a number, as far as that is known before the first one, or
            evaluations cannot be compared.
    """
    settings, stopping = config.evaluation, config.train.early_stopping
    for key, text in (
        ("evaluation.best", settings.best),
        *((f"evaluation.keep_best[{i}]", t) for i, t in enumerate(settings.keep_best)),
        *([("train.early_stopping.metric", stopping.metric)] if stopping.metric else []),
    ):
        _check_measured(config, key, Measured.parse(text))
    if not stopping.metric:
        return
    if not settings.every:
        raise ConfigError(
            "train.early_stopping compares evaluations during training, and evaluation.every = 0 makes none; "
            "set it to a number of iterations"
        )
    if settings.images_during not in (0, settings.images):
        raise ConfigError(
            f"train.early_stopping compares evaluations, and those with evaluation.images_during = "
            f"{counted(settings.images_during, 'image')} have other prompts than the first one with {settings.images}; "
            "set evaluation.images_during = 0"
        )


def _check_measured(config: Any, key: str, wanted: Measured) -> None:
    """Raise ConfigError if a number is not in every evaluation."""
    settings, name = config.evaluation, wanted.name
    tags, label = [b.tag for b in settings.bench], name.partition("/")[0]
    if label in tags:
        if settings.bench[tags.index(label)].when != "every":
            raise ConfigError(
                f'{key} = {str(wanted)!r} needs this benchmark at every evaluation: set when = "every" in '
                f"evaluation.bench[{tags.index(label)}]"
            )
        return
    if not config.rewards and name == "reward" and key != "evaluation.best":
        raise ConfigError(f"{key} = {str(wanted)!r}: there are no rewards; name another number")
    known = ["reward", *(r.label for r in config.rewards), *tags]
    known += [f"{ARTEFACTS}{m}" for m in MEASURES if settings.artefacts]
    # The names of metrics are known after the first evaluation, which checks them.
    if name not in known and not settings.metrics:
        raise ConfigError(
            f"{key} = {str(wanted)!r}: there is no reward, metric or benchmark {name!r}"
            f"{suggest(name, known)} (known: {', '.join(known)})"
        )
