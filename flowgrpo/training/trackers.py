"""Experiment trackers of accelerate: their packages, how a run appears in them, and grids as pictures.

This module imports neither torch nor accelerate, so that the names are checked before anything is loaded.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flowgrpo.config import Config

PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "'flowgrpo[wandb]'"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "aim": ("aim", "aim"),
    "clearml": ("clearml", "clearml"),
    "swanlab": ("swanlab", "swanlab"),
    "dvclive": ("dvclive", "dvclive"),
}
"""The module of each tracker, and what pip installs."""
PROJECT = "flowgrpo"
"""Project under which services group runs (W&B, Trackio, MLflow, Comet, SwanLab)."""
LOGIN = {
    "wandb": "run 'wandb login', or set WANDB_MODE=offline",
    "comet_ml": "set COMET_API_KEY",
    "clearml": "run 'clearml-init'",
    "swanlab": "run 'swanlab login'",
}


def absent_trackers(names: Sequence[str]) -> list[str]:
    """A sentence for each tracker of ``run.trackers`` that is not installed. Nothing is imported.

    Raises:
        ConfigError: If there is no such tracker, with the nearest name.
    """
    absent = []
    for index, name in enumerate(names):
        key = f"run.trackers[{index}]"
        if name not in PACKAGES:
            raise ConfigError(
                f"{key}: unknown tracker {name!r}{suggest(name, PACKAGES)} (known: {', '.join(PACKAGES)})"
            )
        module, package = PACKAGES[name]
        spec = find_spec(module)
        # A folder of that name in the working directory, as W&B makes one, is found without an origin.
        if spec is None or spec.origin is None:
            absent.append(f"{key}: {name!r} is not installed: pip install {package}")
    return absent


def start_trackers(accelerator: "Accelerator", config: "Config") -> None:
    """Open the trackers of a run under its name, with its configuration.

    The run's name is that of its directory. TensorBoard's events, and the local files of W&B, Aim and
    DVCLive, are in the run directory. A resumed run continues the same run in W&B.

    Args:
        accelerator: Gets the trackers. All processes must call this.
        config: The configuration.

    Raises:
        ConfigError: If a tracker cannot be started, for instance without a login.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from flowgrpo.config import dump
    from flowgrpo.config.changes import flat_table

    folder = Path(config.run.folder).resolve()
    values = flat_table(config)
    for name in dict.fromkeys(config.run.trackers):
        tracker = LOGGER_TYPE_TO_CLASS[name](*_place(name, folder), **_options(name, folder))
        try:
            tracker.start()
            if name == "tensorboard":
                # store_init_configuration would write a run of its own for TensorBoard's table of
                # hyperparameters, once more in every session.
                if accelerator.is_main_process:
                    text = dump(config).replace("\n", "\n    ")
                    tracker.writer.add_text("configuration", f"    {text}")
            else:
                tracker.store_init_configuration(values)
        # Every service has errors of its own.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            advice = f"; {LOGIN[name]}" if name in LOGIN else ""
            raise ConfigError(
                f"run.trackers: {name} cannot be started: {reason}{advice}"
            ) from error
        accelerator.trackers.append(tracker)


def _place(name: str, folder: Path) -> tuple[str, ...]:
    """The arguments by position: run or project, and the folder of local files where a tracker takes one."""
    if name == "tensorboard":
        return folder.name, str(folder / "tracking")
    if name == "aim":
        return folder.name, str(folder)
    if name in ("clearml", "dvclive"):
        return (folder.name,)
    return (PROJECT,)


def _options(name: str, folder: Path) -> dict[str, Any]:
    """The arguments by name, which accelerate passes to the tracker's own function."""
    if name == "wandb":
        return {"name": folder.name, "dir": str(folder), **_same_run(folder / "wandb")}
    options: Mapping[str, dict[str, Any]] = {
        "trackio": {"name": folder.name},
        "mlflow": {"run_name": folder.name},
        "swanlab": {"experiment_name": folder.name},
        "dvclive": {"dir": str(folder / "dvclive")},
    }
    return options.get(name, {})


def _same_run(place: Path) -> dict[str, str]:
    """W&B's identity of the run of an earlier session, from the name of its folder ``run-TIME-ID``."""
    found = sorted(place.glob("*run-*-*"), key=lambda p: p.stat().st_mtime)
    return {"id": found[-1].name.rsplit("-", 1)[1], "resume": "allow"} if found else {}


def log_picture(accelerator: "Accelerator", name: str, file: Path, step: int) -> None:
    """Log an image file in the trackers that take pictures: TensorBoard, W&B, Aim, ClearML and SwanLab.

    Args:
        accelerator: Has the trackers.
        name: Name of the picture; pictures of one name are a series.
        file: The image.
        step: Iterations trained so far.
    """
    if not accelerator.is_main_process:
        return
    import numpy as np
    from PIL import Image

    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        with Image.open(file) as picture:
            image = picture.convert("RGB")
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            tracker.writer.flush()
        elif tracker.name in ("aim", "clearml"):
            tracker.log_images({name: image}, step=step)
        else:
            tracker.log_images({name: [image]}, step=step)
