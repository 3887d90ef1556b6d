"""Checks of a configuration that need neither torch nor a model: a mistake is answered at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from flowgrpo.config import Config, ConfigError, find
from flowgrpo.config.distillation import check_taught
from flowgrpo.config.reference import to_table
from flowgrpo.config.training_data import training_prompts, training_source
from flowgrpo.core.imports import import_path
from flowgrpo.core.secrets import REDACTED, redacted_in
from flowgrpo.core.text import counted
from flowgrpo.data.prompt_sets import PromptSet, shared
from flowgrpo.data.videos import require_video
from flowgrpo.policy.model_files import Check, ask_hub, check_adapter, check_path, check_start
from flowgrpo.policy.settings import absent_packages
from flowgrpo.rewards.calls import check_call
from flowgrpo.rewards.loading import check_installed, check_name, check_options, check_places, found
from flowgrpo.rewards.prompt_use import is_declared, prompt_notes
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.trackers import absent_trackers


def check_names(config: Config, num_processes: int, absent: list[str] | None = None) -> None:
    """Check the settings, and that files, rewards and optional packages exist.

    No prompt file is read, and no module of the user is imported for a reward or a metric.

    Args:
        config: The configuration.
        num_processes: Number of processes of the run.
        absent: Gets a sentence for each optional package that is not installed, for a dry run, which goes on
            without it.

    Raises:
        ConfigError: If settings contradict each other, do not fit the number of processes, or name
            a prompt file, a reward or a tracker that does not exist; or, without ``absent``, if an
            optional package is not installed.
    """
    config.check(num_processes)
    if key := redacted_in(to_table(config)):
        raise ConfigError(
            f"{key} is {REDACTED}: secrets are left out of saved configurations; give it again with "
            f"--set {key}=..."
        )
    packages = absent_packages(config.memory, config.train.optimizer)
    packages += absent_trackers(config.run.trackers)
    if config.sampling.num_frames is not None:
        with _collected(packages), _setting("sampling.num_frames"):
            require_video()
    if packages and absent is None:
        raise ConfigError("; ".join(packages))
    if absent is not None:
        absent += packages
    with _setting("prompts.train"):
        training_source(config)
    with _setting("prompts.held_out"):
        if not config.prompts.held_out:
            raise ConfigError(
                "no file is named; 'flowgrpo split-prompts FILE --held-out 64' divides a file of prompts in two"
            )
        find(config.prompts.held_out)
    for key, name, check in _weights(config):
        with _setting(key):
            check(name)
    for index, reward in enumerate(config.rewards):
        if ":" not in reward.model:
            with _setting(f"rewards[{index}].model"):
                check_name(reward.model)


def check_inputs(
    config: Config, num_processes: int, absent: list[str] | None = None
) -> tuple[PromptSet, PromptSet]:
    """Check everything that can be checked before anything is loaded or written.

    - The names of files, packages and rewards (:func:`check_names`).
    - The device exists.
    - The prompt files can be read, and have the metadata to balance by.
    - The rewards and metrics can be imported, and the packages that they need are installed.
    - The model is a pipeline's folder, if it is named by a path.
    - Not all trained rewards say that they ignore prompts, unless this is meant.
    - Benchmarks exist, and so do their data.

    Args:
        config: The configuration.
        num_processes: Number of processes of the run.
        absent: As for :func:`check_names`, also for the packages of rewards and metrics.

    Returns:
        The training prompts and the held-out prompts.

    Raises:
        ConfigError: As :func:`check_names`, or if an import path cannot be imported.
        ImportError: If a package that prompt files need is not installed.
        PromptError: If a prompt file cannot be used.
    """
    check_names(config, num_processes, absent)
    with _setting("run.device"):
        # Imports torch, which the checks above do without.
        from flowgrpo.policy.placement import resolve_device

        resolve_device(config.run.device, num_processes)
    fixed_size = config.sampling.height is not None
    prompts = training_prompts(config)
    held_out = PromptSet.load(find(config.prompts.held_out), config.prompts.balance, fixed_size)
    check_taught(config, prompts.prompts)
    for index, path in enumerate(config.evaluation.metrics):
        with _collected(absent), _setting(f"evaluation.metrics[{index}]"):
            import_path(path)
    _check_models(config, absent)
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


def _check_models(config: Config, absent: list[str] | None) -> None:
    """Check the rewards, the judge of pairs and the model of the guards' features, without constructing them.

    Raises:
        ConfigError: As :func:`_check_model`, or if all trained rewards ignore their prompts.
    """
    importable = []
    for index, reward in enumerate(config.rewards):
        with _collected(absent):
            _check_model(f"rewards[{index}]", reward)
            with _setting(f"rewards[{index}].model"):
                check_call(reward.model, found(reward.model))
            importable.append(reward)
    preference = getattr(config.algorithm, "preference", None)
    if judge := getattr(preference, "model", ""):
        with _collected(absent):
            options = getattr(preference, "options", {})
            _check_model("algorithm.preference", Reward(model=judge, options=options))
    if config.failures.probe == "refuse":
        declared = {r.label: is_declared(found(r.model)) for r in importable}
        prompt_notes(config.rewards, declared, config.algorithm.needs_rewards, refuse=True)
    if config.guard.features:
        with _collected(absent):
            features = Reward(model=config.guard.features, options=config.guard.features_options)
            _check_model("guard.features", features, "guard.features", "guard.features_options")


def _check_model(key: str, reward: Reward, name: str = "", options: str = "") -> None:
    """Check a model that scores, compares or embeds media, without constructing it.

    Args:
        key: Key of its table, for the error.
        reward: Its name and its options.
        name: Key of its name, by default ``model`` of the table.
        options: Key of its options, by default ``options`` of the table.

    Raises:
        ConfigError: If there is none, a package of it is not installed, or its options are wrong.
    """
    with _setting(name or f"{key}.model"):
        check_name(reward.model)
        check_installed(reward.model)
    options = options or f"{key}.options"
    with _setting(options):
        check_options(reward, found(reward.model))
    check_places(reward, options)


def absent_weights(config: Config, and_model: bool = True) -> list[str]:
    """A sentence for each model or adapter that is not here while the hub cannot be asked for it.

    Args:
        config: The configuration.
        and_model: Whether to look for the model itself, too.

    Raises:
        ConfigError: If one is neither here nor on the hub.
    """
    weights, absent = _weights(config), []
    if and_model and config.model.path != "shapes":
        weights.append(("model.path", config.model.path, check_path))
    for key, name, check in weights:
        with _setting(key):
            if check(name) is None and (reason := ask_hub(name)):
                absent.append(
                    f"{key}: {name} is no file or folder here; as an id of the hub, {reason}"
                )
    return absent


def _weights(config: Config) -> list[tuple[str, str, Check]]:
    """Weights besides the model itself, each with its key and check: the base of a single file, earlier
    adapters, and teachers."""
    found: list[tuple[str, str, Check]] = [("model.base", config.model.base, check_path)]
    found += [(f"model.adapters[{i}].path", a.path, check_adapter) for i, a in enumerate(config.model.adapters)]  # fmt: skip
    found += [("model.weights.init", getattr(config.model.weights, "init", ""), check_start)]
    teachers = config.loss.needs.teachers
    for number, teacher in enumerate(teachers.all if teachers else ()):
        if teacher.is_named:
            check = check_path if teacher.weights == "model" else check_start
            found.append((f"loss.teachers[{number}].path", teacher.path, check))
    return [one for one in found if one[1]]


@contextmanager
def _collected(absent: list[str] | None) -> Iterator[None]:
    """Add an error about a package that is not installed to a list, if there is one."""
    try:
        yield
    except ConfigError as error:
        if absent is None or not isinstance(error.__cause__, ImportError):
            raise
        absent.append(str(error))


@contextmanager
def _setting(key: str) -> Iterator[None]:
    """Name the setting in an error about its value."""
    try:
        yield
    # A path such as ~nobody/a has no home, which is a RuntimeError.
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{key}: {error}") from error
