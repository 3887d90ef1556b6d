"""Checks of a configuration that need neither torch nor a model: a mistake is answered at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowgrpo.config import Config, ConfigError, find
from flowgrpo.config.distillation import check_taught
from flowgrpo.config.reference import to_table
from flowgrpo.config.training_data import training_prompts, training_source
from flowgrpo.core.imports import import_path
from flowgrpo.core.secrets import REDACTED, redacted_in
from flowgrpo.core.text import counted
from flowgrpo.data.prompt_sets import PromptSet, shared
from flowgrpo.data.videos import require_video
from flowgrpo.policy.model_files import check_path
from flowgrpo.policy.settings import require_installed
from flowgrpo.rewards.calls import check_call
from flowgrpo.rewards.loading import check_installed, check_name, found
from flowgrpo.rewards.prompt_use import is_declared, prompt_notes
from flowgrpo.training.trackers import check_trackers


def check_names(config: Config, num_processes: int) -> None:
    """Check the settings, and that files, rewards and optional packages exist.

    No prompt file is read, and no module of the user is imported for a reward or a metric.

    Raises:
        ConfigError: If settings contradict each other, do not fit the number of processes, or name
            a prompt file, a reward or a tracker that does not exist or is not installed.
        ImportError: If an optional package is not installed.
    """
    config.check(num_processes)
    if key := redacted_in(to_table(config)):
        raise ConfigError(
            f"{key} is {REDACTED}: secrets are left out of saved configurations; give it again with "
            f"--set {key}=..."
        )
    require_installed(config.memory, config.train.optimizer)
    check_trackers(config.run.trackers)
    if config.sampling.num_frames is not None:
        with _setting("sampling.num_frames"):
            require_video()
    with _setting("prompts.train"):
        training_source(config)
    with _setting("prompts.held_out"):
        find(config.prompts.held_out)
    for key, name in _weights(config).items():
        is_file = name.startswith((".", "/", "~")) or name.endswith(".safetensors")
        if is_file and not Path(name).expanduser().exists():
            raise ConfigError(f"{key}: no such file or folder: {name}")
    for index, reward in enumerate(config.rewards):
        if ":" not in reward.model:
            with _setting(f"rewards[{index}].model"):
                check_name(reward.model)


def check_inputs(config: Config, num_processes: int) -> tuple[PromptSet, PromptSet]:
    """Check everything that can be checked before anything is loaded or written.

    - The names of files, packages and rewards (:func:`check_names`).
    - The device exists.
    - The prompt files can be read, and have the metadata to balance by.
    - The rewards and metrics can be imported, and the packages that they need are installed.
    - The model is a pipeline's folder, if it is named by a path.
    - Not all trained rewards say that they ignore prompts, unless this is meant.
    - Benchmarks exist, and so do their data.

    Returns:
        The training prompts and the held-out prompts.

    Raises:
        ConfigError: As :func:`check_names`, or if an import path cannot be imported.
        ImportError: If an optional package is not installed.
        PromptError: If a prompt file cannot be used.
    """
    check_names(config, num_processes)
    with _setting("run.device"):
        # Imports torch, which the checks above do without.
        from flowgrpo.policy.placement import resolve_device

        resolve_device(config.run.device, num_processes)
    fixed_size = config.sampling.height is not None
    prompts = training_prompts(config)
    held_out = PromptSet.load(find(config.prompts.held_out), config.prompts.balance, fixed_size)
    check_taught(config, prompts.prompts)
    for index, path in enumerate(config.evaluation.metrics):
        with _setting(f"evaluation.metrics[{index}]"):
            import_path(path)
    for index, reward in enumerate(config.rewards):
        with _setting(f"rewards[{index}].model"):
            check_name(reward.model)
            check_installed(reward.model)
            check_call(reward.model, found(reward.model))
    if config.failures.probe == "refuse":
        declared = {r.label: is_declared(found(r.model)) for r in config.rewards}
        prompt_notes(config.rewards, declared, config.algorithm.needs_rewards, refuse=True)
    if config.guard.features:
        with _setting("guard.features"):
            check_name(config.guard.features)
            check_installed(config.guard.features)
    with _setting("model.path"):
        check_path(config.model.path)
    if config.evaluation.bench:
        from flowgrpo.training.benchmarks import load_benchmarks

        load_benchmarks(config.evaluation)
    return prompts, held_out


def shared_note(train: PromptSet, held_out: PromptSet) -> list[str]:
    """A sentence about training prompts among the held-out ones; none if there are none."""
    both = shared(train, held_out)
    if not both:
        return []
    verb = "is a training prompt" if len(both) == 1 else "are training prompts"
    return [
        f"{len(both)} of {counted(len(held_out.prompts), 'held-out prompt')} {verb} too, such as "
        f"{both[0].text[:80]!r}: on them, evaluations do not show whether the model does better on new prompts"
    ]


def _weights(config: Config) -> dict[str, str]:
    """Weights besides the model itself: the base of a single file, earlier adapters, and teachers."""
    found = {"model.base": config.model.base}
    found |= {f"model.adapters[{i}].path": a.path for i, a in enumerate(config.model.adapters)}
    teachers = config.loss.needs.teachers
    for number, teacher in enumerate(teachers.all if teachers else ()):
        found[f"loss.teachers[{number}].path"] = teacher.path
    return found | {"model.weights.init": getattr(config.model.weights, "init", "")}


@contextmanager
def _setting(key: str) -> Iterator[None]:
    """Name the setting in an error about its value."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{key}: {error}") from error
