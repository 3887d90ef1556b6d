"""Trackers: what TensorBoard and W&B show of a run, read with their own readers, and refusals."""

import importlib.util
from dataclasses import replace

import pytest
from accelerate import Accelerator
from PIL import Image

import flowgrpo
from flowgrpo.config import ConfigError
from flowgrpo.training import trackers
from flowgrpo.training.trackers import absent_trackers, log_picture, start_trackers


@pytest.fixture
def opened(tmp_path):
    """Opens a tracker of a run called ``tuned``, as a session does, and logs a number and a grid."""
    accelerator = Accelerator(cpu=True)
    Image.new("RGB", (40, 30), "#ff0000").save(tmp_path / "grid.png")

    def open_(name):
        folder = tmp_path / "tuned"
        folder.mkdir(exist_ok=True)
        config = flowgrpo.load(
            "quickstart_flow_grpo", [f"run.folder={folder}", f'run.trackers=["{name}"]']
        )
        start_trackers(accelerator, config)
        accelerator.log({"reward": 0.5}, step=3)
        log_picture(accelerator, "grid", tmp_path / "grid.png", 3)
        return folder, accelerator.trackers[0]

    yield open_
    accelerator.end_training()
    accelerator.trackers = []


def test_tensorboard_has_the_run_its_configuration_and_the_grid(opened):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, tracker = opened("tensorboard")
    tracker.finish()
    events = EventAccumulator(str(folder / "tracking" / "tuned"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(3, 0.5)]
    (grid,) = events.Images("grid")
    assert (grid.step, grid.width, grid.height) == (3, 40, 30)
    assert events.Tags()["tensors"] == ["configuration/text_summary"]
    (text,) = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val
    assert 'path = "shapes"' in text.decode()


def test_wandb_offline_has_the_run_its_configuration_and_its_files(opened, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, tracker = opened("wandb")
    run = tracker.run
    assert (run.name, run.project) == ("tuned", "flowgrpo")
    assert run.config["model.path"] == "shapes"
    place = run.dir
    assert place.startswith(str(folder / "wandb"))
    tracker.finish()
    assert len([*(folder / "wandb").glob("offline-run-*/files/media/images/grid_*.png")]) == 1
    # The next session continues the same run.
    assert trackers._options("wandb", folder)["id"] == run.id


def test_a_tracker_that_is_not_there_is_named_before_a_run(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda n: None if n == "swanlab" else there(n))
    absent = ["run.trackers[1]: 'swanlab' is not installed: pip install swanlab"]
    assert absent_trackers(["tensorboard", "swanlab"]) == absent
    message = r"run.trackers\[0\]: unknown tracker 'tensorbord'; did you mean 'tensorb"
    with pytest.raises(ConfigError, match=message):
        absent_trackers(["tensorbord"])


def test_the_names_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert {*trackers.PACKAGES} == {*LOGGER_TYPE_TO_CLASS}


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def fail(self):
        raise OSError("no key\nsecond line")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    config = flowgrpo.load("quickstart_flow_grpo", [f"run.folder={tmp_path}"])
    config = replace(config, run=replace(config.run, trackers=("tensorboard",)))
    with pytest.raises(ConfigError, match=r"^run.trackers: tensorboard cannot be started: no key$"):
        start_trackers(Accelerator(cpu=True), config)
