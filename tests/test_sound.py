"""The sound of videos: LTX-2's rollouts, rewards that need it, the reward ``clap``, and MP4 files with sound."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from torch import Tensor
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

import flowgrpo
from flowgrpo.algorithms.branch_grpo import BranchGRPO
from flowgrpo.algorithms.flow_grpo import FlowGRPO
from flowgrpo.algorithms.g2rpo import G2RPO
from flowgrpo.algorithms.vgpo import VGPO
from flowgrpo.cli import main
from flowgrpo.config import ConfigError
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS
from flowgrpo.data import videos
from flowgrpo.data.audio import Audio
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation.comparison_grid import ComparisonGrid, load_audio, save_images
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward, RewardError
from reward_models.clap import CLAPScore
from tests import zoo
from tests.conftest import MakePolicy, noise_of
from tests.test_videos import clip

HERE = "tests.test_sound"
NOISY = CPS(noise_level=0.7)
PROMPTS = [Prompt("a cat"), Prompt("a dog")]


def tone(hertz: float, seconds: float = 1.0, rate: int = 8000, channels: int = 2) -> Tensor:
    """A sound ``(channels, time)``, quieter in each further channel."""
    time = torch.arange(round(seconds * rate)) / rate
    wave = 0.5 * torch.sin(2 * math.pi * hertz * time)
    return torch.stack([wave / (1 + c) for c in range(channels)])


def loudness(media: Tensor, prompts: Sequence[Prompt], audio: Audio) -> Tensor:
    """A reward that needs sound."""
    assert len(audio) == len(prompts) == len(media)
    return audio.waveform.abs().flatten(1).mean(1)


loudness.takes_audio = True  # type: ignore[attr-defined]


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def scorer(*names: str, **failures: Any) -> RewardScorer:
    rewards = [Reward(model=f"{HERE}:{n}") for n in names]
    return RewardScorer(rewards, Failures(retries=0, **failures), batch=2)


# LTX-2.
@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("ltx2", batch_size=2)


def test_a_rollout_has_the_sound_that_the_pipeline_returns(policy: PipelinePolicy) -> None:
    (rollout,) = policy.run(PROMPTS, noise_of(0, 1))
    assert policy.makes_audio
    assert rollout.audio is not None
    assert rollout.audio.rate == policy.pipeline.vocoder.config.output_sampling_rate == 16000
    heard, seen = rollout.audio.waveform, rollout.media
    assert heard.shape[:2] == (2, 2)
    assert heard.dtype == torch.float32
    assert not torch.equal(heard[0], heard[1])
    # The same as from the pipeline's own call, entered at the same states.
    (states,) = policy.run(PROMPTS, noise_of(0, 1), decode=False)
    assert states.audio is None
    assert states.x is not None
    (again,) = policy.run(PROMPTS, noise_of(0, 1), nodes=[policy.num_steps()], x=states.x)
    assert again.audio is not None
    torch.testing.assert_close(again.audio.waveform, heard, atol=1e-5, rtol=0)
    assert seen is not None


@pytest.mark.parametrize(
    ("algorithm", "number"),
    [
        (FlowGRPO(group_size=3, transition=NOISY), 3),
        (BranchGRPO(group_size=4, splits=(0, 1), transition=NOISY), 4),  # the leaves of trees
        (
            G2RPO(
                group_size=2, steps=Window(start=1, size=1), granularities=(1, 2), transition=NOISY
            ),
            4,
        ),
        (VGPO(group_size=2, transition=NOISY), 2 * 3),  # after each of three stochastic steps
    ],
    ids=["trajectories", "branches", "sub-grids", "projections"],
)
def test_rewards_hear_every_kind_of_candidate(
    algorithm: Any, number: int, policy: PipelinePolicy
) -> None:
    subject = scorer("brightness", "loudness")
    experience = algorithm.collect(policy, [Group(0, PROMPTS[0])], subject, Random(3), 0)
    raw = experience.candidates.scores.raw
    assert raw["loudness"].unique().numel() == number
    torch.testing.assert_close(experience.candidates.reward, raw["brightness"] + raw["loudness"])
    assert experience.candidates.valid.all()


def test_grids_show_what_needs_no_sound_and_keep_sound_for_the_probe(
    policy: PipelinePolicy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid, file = ComparisonGrid(PROMPTS, 1, 0), tmp_path / "base.safetensors"
    images, audio = grid.generate_with_audio(policy, policy.sampling)
    assert audio is not None
    save_images(file, images, audio)
    kept = load_audio(file)
    assert kept is not None
    assert kept.rate == audio.rate
    assert torch.equal(kept.waveform, audio.waveform)
    save_images(file, images)
    assert load_audio(file) is None
    assert scorer("loudness", "brightness").marks(images, PROMPTS)[0] == "brightness"
    assert scorer("loudness").marks(images, PROMPTS) == ("", None)
    scorer("loudness").probe(images, PROMPTS, audio)
    assert "'loudness' prefers noise" in caplog.text
    same = Audio(audio.waveform[:1].repeat(2, 1, 1), audio.rate)
    with pytest.raises(RewardError, match="gave all 2 different probe images the same score"):
        scorer("loudness").probe(images, PROMPTS, same)


def test_sound_that_is_not_finite_has_no_score() -> None:
    waveform = torch.stack([tone(440), tone(440)])
    waveform[1, 0, 5] = math.nan
    subject = scorer("brightness", "loudness")
    found = subject.score(torch.rand(2, 4, 3, 8, 8), PROMPTS, Audio(waveform, 8000))
    assert found.raw["loudness"].isnan().tolist() == [False, True]
    assert found.raw["brightness"].isfinite().all()
    assert (subject.broken_media, subject.failures_seen) == (1, 1)


def test_rewards_without_sound_are_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="'loudness' needs sound, and WanPipeline makes none"):
        scorer("brightness", "loudness").check_audio(False, "WanPipeline makes none")
    scorer("brightness").check_audio(False, "it makes none")
    with pytest.raises(RewardError, match="'loudness' needs sound, and the media have none"):
        scorer("loudness").score(torch.rand(2, 4, 3, 8, 8), PROMPTS)
    assert main(["serve-reward", f"{HERE}:loudness", "--port", "0"]) == 1
    assert (
        "'loudness' needs sound, which requests to a reward server do not"
        in capsys.readouterr().err
    )
    of_frames = {"model": f"{HERE}:loudness"}
    with pytest.raises(ValueError, match="needs the sound of a whole video"):
        load_reward(Reward(model="flowgrpo.rewards.frames:FrameScore", options=of_frames))


def test_a_run_with_a_silent_model_is_refused(tmp_path: Path) -> None:
    rewards = f"rewards=[{{model='{HERE}:loudness'}}]"
    config = flowgrpo.load(
        "quickstart_flow_grpo", [rewards, f"run.folder={tmp_path / 'run'}", "run.device=cpu"]
    )
    with pytest.raises(
        ConfigError, match=r"'loudness' needs sound, and \w+Pipeline makes none; remove"
    ):
        flowgrpo.train(config)


# CLAP.
@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_clap(tmp_path_factory.mktemp("clap"))


def by_hand(folder: Path, sounds: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
    """The cosines from the forward pass of ``ClapModel``, one sound and one text at a time."""
    model = ClapModel.from_pretrained(folder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for sound, text in zip(sounds, texts, strict=True):
        inputs = extractor(sound, sampling_rate=8000, return_tensors="pt")
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(
                **tokens, input_features=inputs["input_features"].float()
            ).logits_per_audio
        found.append(logits.squeeze() / model.logit_scale_a.exp())
    return torch.stack(found)


def quantised(mono: np.ndarray) -> np.ndarray:
    return np.round(np.clip(mono, -1, 1) * 32767) / 32767


def test_clap_is_the_cosine_of_the_published_class(clap: Path) -> None:
    reward = CLAPScore(str(clap), device="cpu")
    media, sounds = torch.rand(2, 2, 3, 8, 8), torch.stack([tone(440, 0.7), tone(1500, 0.7)])
    scores = reward(media, PROMPTS, Audio(sounds, 8000))
    mono = [quantised(s.mean(0).double().numpy()) for s in sounds]
    texts = [p.text for p in PROMPTS]
    torch.testing.assert_close(scores, by_hand(clap, mono, texts), rtol=0, atol=1e-5)
    assert scores[0] != scores[1]
    # One at a time, and without looking at the picture.
    alone = [
        reward(media[:1] * 0, [p], Audio(s[None], 8000))
        for p, s in zip(PROMPTS, sounds, strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=0, atol=1e-5)
    # Another rate is resampled to the model's.
    fast = torch.stack([tone(440, 0.7, 12000), tone(1500, 0.7, 12000)])
    mono = [quantised(resample_poly(s.mean(0).double().numpy(), 2, 3)) for s in fast]
    torch.testing.assert_close(
        reward(media, PROMPTS, Audio(fast, 12000)), by_hand(clap, mono, texts), rtol=0, atol=1e-5
    )
    sounds[1, 0, 3] = math.nan
    assert reward(media, PROMPTS, Audio(sounds, 8000)).isnan().tolist() == [False, True]


def test_clap_hears_all_of_a_long_sound(clap: Path) -> None:
    """2.5 seconds are three windows of one second, which begin at 0, 0.75 and 1.5 seconds."""
    reward = CLAPScore(str(clap), batch_size=2, device="cpu")
    parts = [tone(f, 1.25, channels=1)[0] for f in (300, 2000)]
    mono = quantised(torch.cat(parts).double().numpy())
    windows = [mono[s : s + 8000] for s in (0, 6000, 12000)]
    expected = by_hand(clap, windows, ["a cat"] * 3).mean()
    sound = Audio(torch.cat(parts)[None, None], 8000)
    for _ in range(2):  # nothing is drawn at random
        score = reward(torch.zeros(1, 1, 3, 8, 8), PROMPTS[:1], sound)
        torch.testing.assert_close(score, expected[None], rtol=0, atol=1e-5)


def test_clap_reads_the_text_of_the_sound_from_metadata(clap: Path) -> None:
    reward, plain = (
        CLAPScore(str(clap), key="sound", device="cpu"),
        CLAPScore(str(clap), device="cpu"),
    )
    media, audio = torch.zeros(1, 1, 3, 8, 8), Audio(tone(440)[None], 8000)
    described = Prompt("a photo", metadata={"sound": "a dog"})
    assert torch.equal(reward(media, [described], audio), plain(media, PROMPTS[1:], audio))
    with pytest.raises(ValueError, match=r"prompt 'a cat' has no text under metadata\['sound'\]"):
        reward.check([described, PROMPTS[0]])
    with pytest.raises(
        ValueError, match=r"with 2 samples and none of size zero, got \(1, 2, 8000\)"
    ):
        plain(media, PROMPTS, audio)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CLAPScore(str(clap), batch_size=0)


# Files.
def test_mp4_with_sound_reads_back_and_is_scored(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / "out"
    out.mkdir()
    for name, volume in (("a", 1.0), ("b", 0.25)):
        sound = Audio(volume * tone(440, 0.5, 16000)[None], 16000)
        videos.write_video(out / f"{name}.mp4", clip(8), fps=16.0, audio=sound)
    assert sorted(p.name for p in out.iterdir()) == ["a.mp4", "b.mp4"]
    read = videos.read_audio(out / "a.mp4")
    assert read is not None
    assert (read.rate, read.waveform.shape[:2]) == (16000, (1, 2))
    middle, wanted = read.waveform[0, :, 2000:6000], tone(440, 0.5, 16000)
    # AAC is lossy and may shift the sound; the amplitude and the frequency stay.
    assert middle.abs().amax(1).tolist() == pytest.approx(wanted.abs().amax(1).tolist(), abs=0.05)
    loudest = middle[0].double().numpy() @ np.exp(-2j * np.pi * 440 / 16000 * np.arange(4000))
    assert abs(loudest) / 2000 == pytest.approx(0.5, abs=0.05)
    assert (videos.read_video(out / "a.mp4") - clip(8)).abs().max() < 0.03
    table = tmp_path / "t.jsonl"
    arguments = ["score", str(out), "--reward", f"{HERE}:loudness", "--out", str(table)]
    assert main(arguments) == 0
    loud, quiet = (json.loads(line)["loudness"] for line in table.read_text().splitlines())
    assert loud / quiet == pytest.approx(4, rel=0.1)
    videos.write_video(out / "c.mp4", clip(8))
    assert videos.read_audio(out / "c.mp4") is None
    capsys.readouterr()
    assert main(arguments) == 1
    assert "c.mp4 has no sound, which a reward needs" in capsys.readouterr().err


def test_sample_writes_what_the_model_sounds_like(
    policy: PipelinePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr("flowgrpo.cli.sample.load_policy", lambda options, steps: policy)
    out = tmp_path / "out"
    assert main(["sample", "m", "a cat", "--samples", "2", "--out", str(out)]) == 0
    noise = SampleNoise([Random(0).at("sample", 0, s) for s in range(2)])
    (rollout,) = policy.run([PROMPTS[0]] * 2, noise)
    assert rollout.audio is not None
    for s in range(2):
        read = videos.read_audio(out / f"00000_{s}.mp4")
        assert read is not None
        assert (read.rate, len(read.waveform[0])) == (16000, 2)
        power = [a.waveform.square().mean().item() for a in (read, rollout.audio[s : s + 1])]
        assert power[0] > 0
