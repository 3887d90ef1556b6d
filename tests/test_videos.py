"""MP4 files: written by ``sample``, read by ``score``, and playable elsewhere."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from flowgrpo.cli import main
from flowgrpo.data import videos
from flowgrpo.policy import Sampling
from flowgrpo.policy.rollout import Rollout

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def clip(frames: int = 6, size: int = 32) -> torch.Tensor:
    """A video whose frames get brighter, red first and then blue."""
    media = torch.zeros(frames, 3, size, size)
    for f in range(frames):
        media[f, 0 if f < frames // 2 else 2] = 0.2 + 0.1 * f
    return media


def test_a_video_is_h264_that_players_take_and_reads_back(tmp_path):
    path = tmp_path / "a.mp4"
    videos.write_video(path, clip(), fps=12.0)
    facts = next(imageio_ffmpeg.read_frames(str(path)))
    assert (facts["codec"], facts["fps"], facts["source_size"]) == ("h264", 12.0, (32, 32))
    assert facts["pix_fmt"].startswith("yuv420p")
    assert imageio_ffmpeg.count_frames_and_secs(str(path)) == (6, pytest.approx(0.5, abs=0.01))
    read = videos.read_video(path)
    assert read.shape == clip().shape
    assert (read - clip()).abs().max() < 0.03
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_odd_sizes_are_written(tmp_path):
    videos.write_video(tmp_path / "a.mp4", clip(2, 33))
    assert videos.read_video(tmp_path / "a.mp4").shape == (2, 3, 34, 34)


def test_what_is_no_video_is_said(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"a\.mp4 is not a video that can be read"):
        videos.read_video(tmp_path / "a.mp4")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(videos, "find_spec", lambda name: None if name == "imageio_ffmpeg" else 1)
    with pytest.raises(ImportError, match=r"needs imageio-ffmpeg: pip install 'flowgrpo\[video\]'"):
        videos.require_video()


def test_the_frame_rate_is_that_of_the_call():
    assert videos.frames_per_second({"frame_rate": 25.0, "max_sequence_length": 16}) == 25.0
    assert videos.frames_per_second({}) == 16.0


class Stub:
    """A policy that draws given media, without a model."""

    pipeline, dtype, batch_size = object(), torch.float16, 8

    def __init__(self, media, makes_videos):
        self.media, self.makes_videos, self.sampling = media, makes_videos, Sampling()

    def run(self, prompts, noise):
        yield Rollout(range(len(prompts)), None, self.media, [])


@pytest.fixture
def draws(monkeypatch):
    def use(media, makes_videos=False):
        stub = Stub(media, makes_videos)
        monkeypatch.setattr("flowgrpo.cli.sample.load_policy", lambda options, steps: stub)

    return use


def test_sample_writes_mp4_and_score_reads_them(draws, tmp_path, capsys):
    draws(torch.stack([clip(), clip() / 2]), makes_videos=True)
    out, table = tmp_path / "out", tmp_path / "t.jsonl"
    assert main(["sample", "m", "a walk", "--samples", "2", "--fps", "8", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000_0.mp4", "00000_1.mp4", "index.jsonl"]
    assert next(imageio_ffmpeg.read_frames(str(out / "00000_0.mp4")))["fps"] == 8.0
    reward = ["--reward", "tests.test_train:darkness_of_any", "--out", str(table)]
    assert main(["score", str(out), *reward]) == 0
    found = [json.loads(line)["darkness_of_any"] for line in table.read_text().splitlines()]
    expected = [1 - float(clip().mean()), 1 - float(clip().mean()) / 2]
    assert found == pytest.approx(expected, abs=0.01)
    assert main(["sample", "m", "a walk", "--out", str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_sample_names_pictures_that_are_not_finite(draws, tmp_path, capsys):
    media = torch.rand(4, 3, 8, 8)
    media[2, 0, 0, 0] = float("nan")
    draws(media)
    assert main(["sample", "m", "a", "b", "--samples", "2", "--out", str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err
    assert "1 of 4 are NaN or infinite and were not written: 00001_0.png. The weights" in error
    assert (
        "overflow in float16; run 'flowgrpo doctor' on the model, or try --dtype float32" in error
    )
    index = [json.loads(line) for line in (tmp_path / "o" / "index.jsonl").read_text().splitlines()]
    names = ["00000_0.png", "00000_1.png", "00001_1.png"]
    assert [r["file"] for r in index] == names
    assert sorted(p.name for p in (tmp_path / "o").glob("*.png")) == names


def test_options_that_do_not_fit_the_model_are_refused(draws, tmp_path, capsys):
    draws(torch.rand(4, 3, 8, 8))
    assert main(["sample", "m", "a", "--fps", "8", "--out", str(tmp_path / "o")]) == 2
    assert "--fps is for videos, and object makes images" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_push_without_a_network_is_one_sentence(monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    http = sys.modules[hub.errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]

    def fail(*_, **__):
        raise http.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("flowgrpo.cli.push.push_run", fail)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(endpoint="https://hub"))
    assert main(["push", "run", "me/model"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flowgrpo: me/model was not uploaded to https://hub: [Errno -2] Name")
    assert len(error.splitlines()) == 1
