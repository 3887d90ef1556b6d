"""The reward scorer: finding rewards, how they can fail, and that no missing score becomes a number."""

import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgrpo.core.errors import ConfigError, DivergenceError
from flowgrpo.core.imports import import_path
from flowgrpo.data.audio import Audio
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.elsewhere import LoadedElsewhere, load_once
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward, RewardError
from flowgrpo.rewards.streams import OwnStream

HERE = "tests.test_scorer"
PROMPTS = [Prompt(f"prompt {i}") for i in range(4)]
IMAGES = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
calls: list[str] = []


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    calls.clear()
    released.clear()


# Reward models, as a user would write them.
def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("brightness")
    return media.flatten(1).mean(1)


def constant(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.full((len(prompts),), 0.5)


def second_is_nan(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("second_is_nan")
    scores = brightness(media, prompts)
    scores[1] = math.nan
    return scores


def infinite(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.full((len(prompts),), math.inf)


def broken(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("broken")
    raise ConnectionError("no route to the reward server")


def column(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("column")
    return torch.zeros(len(prompts), 1)


def a_list(media: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    return [float(i) for i in range(len(prompts))]


def nothing(media: Tensor, prompts: Sequence[Prompt]) -> None:
    return None


def slow_when_dark(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    time.sleep(0.05 * (1 - float(media.mean())))
    calls.append(prompts[0].text)
    return media.flatten(1).mean(1)


released = threading.Event()


def hangs(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("hangs")
    released.wait(60)
    return torch.zeros(len(prompts))


class Flaky:
    """Fails ``times`` times, by an exception or by NaN in every second score."""

    def __init__(self, times: int, how: str = "raise"):
        self.left, self.how = times, how

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append("flaky")
        scores = media.flatten(1).mean(1)
        if self.left > 0:
            self.left -= 1
            if self.how == "raise":
                raise TimeoutError("busy")
            scores[self.left % 2 :: 2] = math.nan
        return scores


not_a_reward = 3


def scorer(*names: str | Reward, **failures: object) -> RewardScorer:
    rewards = [n if isinstance(n, Reward) else Reward(model=f"{HERE}:{n}") for n in names]
    return RewardScorer(rewards, Failures(wait=0.0, **failures))  # type: ignore[arg-type]


def flaky(times: int, how: str = "raise") -> Reward:
    return Reward(model=f"{HERE}:Flaky", options={"times": times, "how": how})


# Finding rewards.
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Reward(model="jpegsize"), r"unknown reward 'jpegsize'; did you mean 'jpeg_size'\?.*known:"),
        (Reward(model="flow_grpo_server"), r"was removed: .*model = \"remote\"; docs/serving.md, section"),
        (Reward(model="no_such_package:x"), "there is no module 'no_such_package'"),
        (Reward(model=f"{HERE}:brightnes"), r"no 'brightnes'; did you mean 'brightness'\?"),
        (Reward(model="jpeg_size", options={"size": 3}), r"'jpeg_size': .*'size'; it takes \(goal"),
        (Reward(model=f"{HERE}:Flaky"), "'Flaky': missing a required argument: 'times'"),
        (Reward(model=f"{HERE}:constant", options={"a": 1}), "is a function and takes no options"),
        (Reward(model=f"{HERE}:not_a_reward"), "not_a_reward' is 3, "),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be_loaded(reward, message):
    with pytest.raises(ValueError, match=message):
        load_reward(reward)


def test_a_folder_of_the_same_name_does_not_hide_the_rewards(tmp_path: Path):
    (tmp_path / "reward_models").mkdir()
    (tmp_path / "reward_models" / "__init__.py").write_text("mine = True")
    (tmp_path / "reward_models" / "jpeg_size.py").write_text("__all__ = ['int']")
    root = Path(__file__).parents[1]
    code = """
from flowgrpo.rewards.loading import Reward, available_rewards, load_reward
assert "jpeg_size" in available_rewards() and "shared" not in available_rewards()
for model in ("jpeg_size", "reward_models.jpeg_size:JPEGSize"):
    assert type(load_reward(Reward(model=model))).__name__ == "JPEGSize"
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    run = [sys.executable, "-c", code]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True)
    hidden = [sys.executable, "-c", f"import reward_models; assert reward_models.mine\n{code}"]
    failed = subprocess.run(hidden, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ValueError: another package 'reward_models' is imported, from" in failed.stderr


def test_import_path_needs_a_colon():
    with pytest.raises(ValueError, match=r"'os.path' is no import path; write 'package.module:nam"):
        import_path("os.path")
    assert import_path("math:pi") == math.pi


@pytest.mark.parametrize("code", ["1 / 0", "def f(:", "raise SystemExit(3)"])
def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, code):
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"^'{name}:x': module {name} cannot be imported: \w+: "):
        import_path(f"{name}:x")


def test_two_rewards_need_two_names():
    with pytest.raises(ValueError, match=r"\['brightness', 'brightness'\]"):
        scorer("brightness", "brightness")
    named = Reward(model=f"{HERE}:brightness", name="light")
    assert set(scorer("brightness", named).score(IMAGES, PROMPTS).raw) == {"brightness", "light"}
    # Without a reward nothing is known of the media.
    assert scorer().score(IMAGES, PROMPTS).reward.isnan().all()


# Scoring.
def test_the_reward_is_the_weighted_sum_and_weight_0_is_only_measured():
    found = scorer(
        Reward(model=f"{HERE}:brightness", weight=2.0),
        Reward(model=f"{HERE}:a_list", weight=-0.5),
        Reward(model=f"{HERE}:second_is_nan", name="measured", weight=0.0),
    ).score(IMAGES, PROMPTS)
    light = IMAGES.flatten(1).mean(1)
    assert torch.allclose(found.reward, 2 * light - 0.5 * torch.arange(4.0))
    assert found.raw["a_list"].tolist() == [0, 1, 2, 3]
    assert found.raw["measured"].isnan().tolist() == [False, True, False, False]


def test_scores_come_in_the_order_of_submission():
    subject = scorer("slow_when_dark")
    futures = [subject.submit(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    assert [float(f.result().reward) for f in futures] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert calls == [p.text for p in PROMPTS]
    assert (subject.scored, subject.failures_seen) == (4, 0)
    assert subject.seconds > 0.05
    subject.close()


@pytest.mark.parametrize(("name", "shape"), [("column", r"\(4, 1\)"), ("nothing", "None")])
def test_a_wrong_result_stops_at_once(name, shape):
    with pytest.raises(RewardError, match=f"reward '{name}' returned .*{shape}"):
        scorer(name, then="drop").score(IMAGES, PROMPTS)
    assert len(calls) <= 1


# Failing.
@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_reward_that_recovers_is_retried(how, caplog):
    subject = scorer(flaky(2, how), retries=2)
    found = subject.score(IMAGES, PROMPTS)
    assert torch.allclose(found.reward, IMAGES.flatten(1).mean(1))
    assert calls == ["flaky"] * (3 if how == "raise" else 2)
    assert subject.failures_seen == 0


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (3, 4)])
def test_retries_are_counted_and_logged(retries, attempts, caplog):
    found = scorer("broken", retries=retries).score(IMAGES, PROMPTS)
    assert calls == ["broken"] * attempts
    assert found.reward.isnan().all()
    assert len(caplog.records) == attempts
    assert "reward 'broken' failed (attempt 1): no route" in caplog.text


def test_a_stop_is_seen_when_a_batch_is_submitted_and_while_its_score_is_awaited():
    class Stop(BaseException):
        pass

    def stop() -> None:
        raise Stop

    subject = scorer("slow_when_dark")
    waiting = subject.submit(torch.zeros(2, 3, 4, 4), PROMPTS[:2])
    while not subject._worker.current_call()[0] and not calls:
        time.sleep(0.001)  # Closing cancels calls that have not begun.
    subject.safe_point = stop
    with pytest.raises(Stop):
        subject.submit(IMAGES, PROMPTS)
    waiting._watch = stop
    with pytest.raises(Stop):
        waiting.result()
    subject.safe_point = lambda: None
    subject.close()
    assert calls == [PROMPTS[0].text]
    assert not subject._worker._thread.is_alive()


def test_waiting_doubles():
    subject = RewardScorer([flaky(2)], Failures(wait=0.04, retries=2))
    began = time.perf_counter()
    subject.score(IMAGES, PROMPTS)
    assert 0.12 <= time.perf_counter() - began < 1


def test_waiting_has_a_longest_time():
    failures = Failures(wait=1.0, retries=100)
    assert [failures.pause(i) for i in (1, 2, 10, 11, 100)] == [1, 2, 512, 600, 600]
    assert Failures(wait=3600.0).pause(3) == 3600


def test_a_reward_that_hangs_ends_the_run_and_does_not_hold_the_process():
    subject = scorer("hangs", timeout=0.3, retries=5)
    late = subject.submit(IMAGES[:1], PROMPTS[:1])  # waits behind the one that hangs
    try:
        began = time.monotonic()
        for wait in (lambda: subject.score(IMAGES, PROMPTS), late.result):
            with pytest.raises(
                RewardError, match=r"'hangs' has not returned for .* failures.timeout = 0.3"
            ):
                wait()
        assert time.monotonic() - began < 5
        assert calls == ["hangs"]
        threads = [t for t in threading.enumerate() if t.name == "reward-scorer"]
        assert threads
        assert all(t.daemon for t in threads)
        subject.close(wait=False)
    finally:
        released.set()


def test_a_call_in_time_is_not_ended_and_0_is_no_limit():
    subject = scorer("slow_when_dark", timeout=10.0)
    assert subject.score(IMAGES, PROMPTS).reward.isfinite().all()
    released.set()
    assert scorer("hangs", timeout=0.0).score(IMAGES, PROMPTS).reward.isfinite().all()


def test_a_score_that_stays_nan_drops_its_sample_only():
    subject = scorer("second_is_nan", retries=1)
    found = subject.score(IMAGES, PROMPTS)
    assert found.reward.isnan().tolist() == [False, True, False, False]
    assert calls.count("second_is_nan") == 2
    assert (subject.failures_seen, subject.scored) == (1, 4)


def test_infinity_is_a_failure_too():
    assert scorer("infinite").score(IMAGES, PROMPTS).raw["infinite"].isnan().all()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("broken", "failed 2 times: no route"), ("second_is_nan", "returned NaN or infinity")],
)
def test_then_stop_ends_the_run(name, problem):
    subject = scorer(name, retries=1, then="stop")
    with pytest.raises(RewardError, match=problem):
        subject.submit(IMAGES, PROMPTS).result()


def test_too_many_failures_stop_the_run_all_the_same():
    subject = scorer("second_is_nan", retries=0, max_rate=0.3)
    subject.score(IMAGES, PROMPTS)
    subject.check_rate()
    strict = scorer("second_is_nan", retries=0, max_rate=0.2)
    strict.score(IMAGES, PROMPTS)
    with pytest.raises(
        RewardError, match=r"1 of 4 scores failed, more than failures.max_rate = 0.2"
    ):
        strict.check_rate()
    strict.reset()
    strict.check_rate()


def test_failures_count_samples_not_scores():
    """Two rewards fail on the same sample, and a third on two others."""
    same = Reward(model=f"{HERE}:second_is_nan", name="again", weight=0.0)
    subject = scorer("second_is_nan", same, retries=0)
    subject.score(IMAGES, PROMPTS)
    assert (subject.failures_seen, subject.scored) == (1, 4)
    subject = scorer("second_is_nan", same, flaky(99, "nan"), retries=0)
    found = subject.score(IMAGES, PROMPTS)
    assert found.raw["Flaky"].isnan().tolist() == [True, False, True, False]
    assert found.reward.isnan().tolist() == [True, True, True, False]
    assert (subject.failures_seen, subject.scored) == (3, 4)
    subject.score(IMAGES[:2], PROMPTS[:2])
    assert (subject.failures_seen, subject.scored) == (4, 6)  # the second, by all three


@pytest.mark.parametrize(("rate", "stops"), [(0.25, False), (0.2499, True), (0.0, True), (1.0, False)])  # fmt: skip
def test_the_largest_rate_of_failures_is_allowed(rate, stops):
    """One sample of four failed."""
    subject = scorer("second_is_nan", retries=0, max_rate=rate)
    subject.check_rate()
    subject.score(IMAGES, PROMPTS)
    if not stops:
        return subject.check_rate()
    with pytest.raises(RewardError, match="1 of 4 scores failed"):
        subject.check_rate()


@pytest.mark.parametrize(("rate", "stops"), [(0.25, False), (0.24, True)])
def test_media_that_are_not_finite_are_the_policys_fault(rate, stops):
    """Two images of eight; the message blames them, and not the rewards."""
    subject = scorer("brightness", "a_list", retries=0, max_rate=rate)
    broken = IMAGES.clone()
    broken[1, 0, 2, 3], broken[2, 1, 0, 0] = math.nan, math.inf
    for media in (broken, IMAGES):
        subject.score(media, PROMPTS)
    assert (subject.broken_media, subject.failures_seen, subject.scored) == (2, 2, 8)
    for check in (subject.check_rate, subject.check_media):
        if stops:
            with pytest.raises(DivergenceError, match="2 of 8 images of the policy contain NaN"):
                check()
        else:
            check()
    subject.reset()
    subject.check_media()


def test_a_later_attempt_fills_in_and_takes_nothing_back():
    """The first attempt fails on 0 and 2, the second on 1 and 3: together all have a score."""
    subject = scorer(flaky(3, "nan"), retries=1)
    found = subject.score(IMAGES, PROMPTS)
    assert calls == ["flaky"] * 2
    assert torch.allclose(found.raw["Flaky"], IMAGES.flatten(1).mean(1))
    assert subject.failures_seen == 0


@pytest.mark.parametrize(("batch", "sizes"), [(0, [4]), (1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])])
def test_batches_are_scored_in_parts(batch, sizes, monkeypatch):
    subject = RewardScorer([Reward(model=f"{HERE}:brightness")], Failures(), batch)
    seen, score = [], subject._score
    monkeypatch.setattr(subject, "_score", lambda *part: seen.append(part) or score(*part))
    audio = Audio(torch.arange(4.0).view(4, 1, 1), 8000)
    found = subject.submit(IMAGES, PROMPTS, audio).result()
    assert [len(m) for m, *_ in seen] == sizes
    assert [p for _, part, *_ in seen for p in part] == PROMPTS
    assert torch.equal(torch.cat([a.waveform for _, _, a, _ in seen]), audio.waveform)
    assert torch.allclose(found.reward, IMAGES.flatten(1).mean(1))
    called, attempt = [], subject._attempt
    monkeypatch.setattr(subject, "_attempt", lambda r, m, media, *rest: called.append(len(media)) or attempt(r, m, media, *rest))  # fmt: skip
    assert torch.equal(subject.score(IMAGES, PROMPTS).reward, found.reward)
    label, marks = subject.marks(IMAGES, PROMPTS)
    assert (label, called) == ("brightness", 2 * sizes)
    assert torch.equal(marks, found.reward)
    subject.close()


def test_weights_follow_their_schedule_in_training_and_are_full_in_evaluations():
    warm = Reward(
        model=f"{HERE}:a_list", weight=2.0, schedule=((10.0, 0.0), (20.0, 1.0)), scale=3.0
    )
    subject = scorer("brightness", warm)
    light, number = IMAGES.flatten(1).mean(1), torch.arange(4.0)
    for iteration, factor in ((0, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (99, 1.0), (None, 1.0)):
        subject.iteration = iteration
        found = subject.score(IMAGES, PROMPTS)
        assert torch.allclose(found.reward, light + 2 * factor * 3 * number)
        assert found.weights == pytest.approx({"brightness": 1.0, "a_list": 2 * factor})
        assert found.raw["a_list"].tolist() == number.tolist()
        assert torch.allclose(found.parts()["a_list"], 6 * factor * number)


class Counting:
    """A reward that learns: its score is the number of samples that it has learned from."""

    def __init__(self) -> None:
        self.seen = torch.zeros(1)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.seen + torch.zeros(len(prompts))

    def update(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
        assert len(media) == len(prompts)
        calls.extend(p.text for p in prompts)
        self.seen += len(media)
        return {"samples": float(len(media))}

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


class Alternating(Counting):
    """Learns alone, except in every third iteration, which trains the policy alone."""

    def trains(self, iteration: int) -> str:
        return "policy" if iteration % 3 == 2 else "reward"


def test_one_of_several_processes_loads_the_rewards():
    """The others know what the run asks of a model; a model that learns is loaded everywhere."""
    rewards = [Reward(model=f"{HERE}:{m}") for m in ("brightness", "Counting", "Loudness")]
    told: list[Any] = []
    first = load_once(rewards, lambda work: told.append(work()) or told[0])
    assert first[0] is brightness
    second = load_once(rewards, lambda work: told[0])
    assert isinstance(second[1], Counting)
    assert second[2] == LoadedElsewhere(takes_audio=True, ignores_prompt=False)
    assert RewardScorer(rewards, load=lambda _: second).audio_rewards == ["Loudness"]
    with pytest.raises(RuntimeError, match="loaded in the first process of the set only"):
        second[0](IMAGES, PROMPTS)


def test_a_reward_takes_turns_with_the_policy():
    subject = scorer("brightness", Reward(model=f"{HERE}:Alternating"))
    learned = []
    for iteration in range(4):
        subject.iteration = iteration
        subject.submit(IMAGES, PROMPTS).result()
        learned.append(bool(subject.learn()))
    assert learned == [True, True, False, True]
    assert subject.state()["reward-Alternating"]["seen"].tolist() == [12.0]
    assert [subject.trains_policy(i) for i in range(4)] == [False, False, True, False]
    subject.check_turns(3)
    with pytest.raises(
        ConfigError, match=r"iterations = 2: reward 'Alternating' learns alone in all"
    ):
        subject.check_turns(2)
    assert scorer("brightness", Reward(model=f"{HERE}:Counting")).trains_policy(0)


def test_a_learning_reward_learns_from_the_iterations_samples_once():
    counting = Reward(model=f"{HERE}:Counting", name="judge")
    subject, plain = scorer("brightness", counting), scorer("brightness")
    assert (plain.learn(), plain.state()) == ({}, {})
    subject.submit(IMAGES, PROMPTS).result()  # an evaluation
    subject.iteration = 0
    for rows in (slice(0, 2), slice(2, 3)):
        subject.submit(IMAGES[rows], PROMPTS[rows]).result()
    calls.clear()
    both = subject.learn(gather=lambda own: [*own, (IMAGES[3:], PROMPTS[3:])])
    assert both == {"learning/judge/samples": 4.0}
    assert calls == [p.text for p in PROMPTS]
    assert subject.state()["reward-judge"]["seen"].tolist() == [4.0]
    subject.submit(IMAGES[:1], PROMPTS[:1]).result()
    assert subject.learn() == {"learning/judge/samples": 1.0}
    assert subject.score(IMAGES, PROMPTS).raw["judge"].tolist() == [5.0] * 4
    other = scorer("brightness", counting)
    other.restore({**subject.state(), "weights": {}})
    assert other.score(IMAGES, PROMPTS).raw["judge"].tolist() == [5.0] * 4


def test_prompts_are_checked_by_every_reward_that_can(monkeypatch):
    def check(prompts):
        calls.append(f"{len(prompts)} prompts")
        if len(prompts) < 4:
            raise ValueError("too few")

    subject = scorer("constant", Reward(model=f"{HERE}:brightness", name="light"))
    monkeypatch.setattr(brightness, "check", check, raising=False)
    subject.check_prompts(PROMPTS)
    assert calls == ["4 prompts"]
    with pytest.raises(ValueError, match="reward 'light': too few"):
        subject.check_prompts(PROMPTS[:1])


# The probe.
def test_a_sound_reward_passes_the_probe_and_leaves_no_trace():
    subject = scorer("brightness")
    subject.probe(IMAGES, PROMPTS)
    assert (subject.scored, subject.failures_seen, subject.seconds) == (0, 0, 0.0)


def test_a_constant_reward_is_refused():
    with pytest.raises(RewardError, match=r"'constant' gave all 4 different probe images .* 0.5"):
        scorer("constant").probe(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="constant"):
        scorer("brightness", "constant").probe(IMAGES, PROMPTS)


def test_a_constant_reward_that_is_not_trained_is_no_problem():
    measured = Reward(model=f"{HERE}:constant", weight=0.0)
    scorer("brightness", measured).probe(IMAGES, PROMPTS)


@pytest.mark.parametrize("name", ["broken", "infinite"])
def test_a_reward_without_finite_scores_is_refused(name):
    with pytest.raises(RewardError, match=f"'{name}' gave no finite score to 4 probe images"):
        scorer(name, retries=0).probe(IMAGES, PROMPTS)


def test_a_reward_that_is_constant_where_it_is_finite_is_refused():
    same = torch.full_like(IMAGES, 0.25)
    with pytest.raises(RewardError, match="same score"):
        scorer("second_is_nan", retries=0).probe(same, PROMPTS)
    # One score cannot show that a reward is constant.
    scorer("second_is_nan", retries=0).probe(same[:2], PROMPTS[:2])


def fond_of_noise(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The spread of an image's pixels; the probe's images are flat."""
    return media.flatten(1).std(1) + 0.01 * media.flatten(1).mean(1)


def noise_is_nan(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    spread = media.flatten(1).std(1)
    return torch.where(spread > 0.1, math.nan, media.flatten(1).mean(1))


@pytest.mark.parametrize(
    ("name", "weight", "warning"),
    [
        ("fond_of_noise", 1.0, "prefers noise"),
        ("fond_of_noise", -1.0, ""),
        ("brightness", -1.0, ""),
        ("noise_is_nan", 1.0, "no finite score to noise"),
    ],
)
def test_noise_is_scored_with_the_probe(name, weight, warning, caplog):
    with caplog.at_level(logging.WARNING):
        scorer(Reward(model=f"{HERE}:{name}", weight=weight)).probe(IMAGES, PROMPTS)
    assert warning in caplog.text
    assert bool(caplog.text) is bool(warning)


def test_probe_modes(caplog):
    with caplog.at_level(logging.WARNING):
        scorer("constant", probe="warn").probe(IMAGES, PROMPTS)
    assert "nothing to learn from it" in caplog.text
    scorer("broken", probe="off").probe(IMAGES, PROMPTS)
    assert not calls


# Sound.


class Loudness:
    """The loudest value of the sound."""

    takes_audio = True

    def __call__(self, media: Tensor, prompts: Sequence[Prompt], audio: Audio) -> Tensor:
        calls.append(f"{len(audio.waveform)} sounds")
        return audio.waveform.abs().flatten(1).amax(1)


SOUND = Audio(torch.linspace(-0.75, 0.5, 4).view(4, 1, 1).expand(4, 2, 6).clone(), 8000)


def test_sound_reaches_the_rewards_that_need_it_and_no_others():
    loud = Reward(model=f"{HERE}:Loudness", weight=2.0)
    subject = scorer(loud, "brightness")
    assert subject.audio_rewards == ["Loudness"]
    found = subject.score(IMAGES, PROMPTS, SOUND)
    wanted = SOUND.waveform[:, 0, 0].abs()
    assert torch.allclose(found.raw["Loudness"], wanted)
    assert torch.allclose(found.reward, 2 * wanted + IMAGES.flatten(1).mean(1))
    with pytest.raises(RewardError, match="'Loudness' needs sound, and the media have none"):
        subject.score(IMAGES, PROMPTS)
    subject.check_audio(True, "the model makes none")
    with pytest.raises(ConfigError, match="'Loudness' needs sound, and the model makes none;"):
        subject.check_audio(False, "the model makes none")
    scorer("brightness").check_audio(False, "the model makes none")
    # Pictures have no sound: the first reward that needs none marks them.
    label, values = subject.marks(IMAGES, PROMPTS)
    assert label == "brightness"
    assert torch.allclose(values, IMAGES.flatten(1).mean(1))
    assert scorer(loud).marks(IMAGES, PROMPTS) == ("", None)
    label, values = scorer("a_list", "brightness").marks(IMAGES, PROMPTS)
    assert (label, values.tolist()) == ("a_list", [0, 1, 2, 3])


def test_sound_that_is_not_finite_fails_the_rewards_that_hear_it():
    broken = Audio(SOUND.waveform.clone(), 8000)
    broken.waveform[2, 0, 3] = math.nan
    subject = scorer(Reward(model=f"{HERE}:Loudness"), "brightness", retries=3)
    found = subject.score(IMAGES, PROMPTS, broken)
    assert found.raw["Loudness"].isnan().tolist() == [False, False, True, False]
    assert found.raw["brightness"].isfinite().all()
    # No further attempt could help.
    assert calls == ["4 sounds", "brightness"]
    assert (subject.broken_media, subject.failures_seen) == (1, 1)


def test_the_probe_scores_noise_with_its_own_sound(caplog):
    subject = scorer(Reward(model=f"{HERE}:Loudness"))
    with caplog.at_level(logging.WARNING):
        subject.probe(IMAGES, PROMPTS, Audio(SOUND.waveform.repeat(1, 1, 50), 8000))
    assert calls == ["5 sounds"]
    assert "prefers noise (0.9" in caplog.text, "white noise reaches from -1 to 1"
    assert "(at most 0.75)" in caplog.text


# More of how it can fail.


def leaves(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("leaves")
    sys.exit(0)


def stopped(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    calls.append("stopped")
    raise KeyboardInterrupt


def test_a_reward_that_ends_the_process_has_failed_and_an_interrupt_is_none(caplog):
    subject = scorer("leaves", retries=1)
    assert subject.score(IMAGES, PROMPTS).reward.isnan().all()
    assert calls == ["leaves"] * 2
    assert "it called sys.exit" in caplog.text
    with pytest.raises(RewardError, match="failed 1 times: it called sys"):
        scorer("leaves", retries=0, then="stop").score(IMAGES, PROMPTS)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        scorer("stopped", retries=3).score(IMAGES, PROMPTS)
    assert calls == ["stopped"]


def test_waiting_looks_up_now_and_then():
    subject, looks = scorer("hangs"), []
    subject.safe_point = lambda: looks.append(time.monotonic())
    waiting = subject.submit(IMAGES[:1], PROMPTS[:1])
    threading.Timer(0.3, released.set).start()
    waiting.result()
    assert 2 <= len(looks) < 10, "not all the time"
    subject.close()


def test_features_are_computed_in_training_only():
    subject = scorer("brightness")
    assert subject.keeps_media is False
    subject.features = lambda media: media.flatten(1)[:, :2]
    assert subject.score(IMAGES, PROMPTS).features is None
    subject.iteration = 0
    assert torch.equal(subject.score(IMAGES, PROMPTS).features, IMAGES.flatten(1)[:, :2])
    subject.features = None
    assert subject.score(IMAGES, PROMPTS).features is None


def test_closing_cancels_what_has_not_begun():
    subject = scorer("hangs")
    first, second = (subject.submit(IMAGES[:1], PROMPTS[:1]) for _ in range(2))
    while not calls:
        time.sleep(0.001)
    subject.close(wait=False)
    assert second.cancelled()
    assert not first.done()
    released.set()
    assert first.result(timeout=20).reward.tolist() == [0]
    assert calls == ["hangs"]


def test_a_probe_counts_a_single_finite_score_as_no_constant(caplog):
    # Half of the images fail: the others are constant.
    same = torch.full_like(IMAGES, 0.25)
    with pytest.raises(RewardError, match="all 3 different probe images the same score"):
        scorer("second_is_nan", retries=0).probe(same, PROMPTS)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        scorer(Reward(model=f"{HERE}:constant", weight=0.0), "brightness").probe(IMAGES, PROMPTS)
        scorer("constant", probe="warn").probe(IMAGES[:1], PROMPTS[:1])
    assert caplog.text == ""


def sizes(media: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Where a sample is in its batch, and the size of the batch."""
    assert len(media) == len(prompts)
    return [10 * i + len(prompts) for i in range(len(prompts))]


def test_one_reward_is_scored_once_in_parts_and_without_retries():
    rewards = [Reward(model=f"{HERE}:{name}") for name in ("broken", "sizes", "Loudness", "column")]
    subject = RewardScorer(rewards, Failures(wait=0.0, retries=3), batch=3)

    def once(index: int, audio: Audio | None = None) -> Tensor | None:
        return subject.score_once(rewards[index], IMAGES, PROMPTS, audio)

    assert once(1).tolist() == [3, 13, 23, 1]
    assert once(2, SOUND).tolist() == SOUND.waveform[:, 0, 0].abs().tolist()
    assert calls == ["3 sounds", "1 sounds"]
    calls.clear()
    assert once(0) is None
    assert once(2) is None, "no sound"
    assert once(3) is None
    assert calls == ["broken", "column"]
    assert (subject.scored, subject.failures_seen) == (0, 0)
    subject.batch = 0
    assert once(1).tolist() == [4, 14, 24, 34]


def test_a_judge_is_loaded_once_and_is_no_reward():
    subject = scorer("brightness")
    one, same, other = (Reward(model=f"{HERE}:Flaky", name=n, options={"times": 1}) for n in ("a", "a", "b"))  # fmt: skip
    assert subject.loaded(one) is subject.loaded(same)
    assert subject.loaded(one) is not subject.loaded(other)
    assert list(subject.score(IMAGES, PROMPTS).raw) == ["brightness"]
    assert subject.failures == Failures(wait=0.0)
    assert RewardScorer([Reward(model=f"{HERE}:brightness")]).failures == Failures()


def test_what_is_counted_and_weighed_in_a_score():
    half = Reward(
        model=f"{HERE}:constant", weight=0.5, schedule=((0.0, 0.0), (10.0, 1.0)), scale=4.0
    )
    logged = Reward(model=f"{HERE}:second_is_nan", weight=0.0)
    subject = scorer(half, logged, retries=0)
    subject.iteration = 5
    images = IMAGES.clone()
    images[3, 0, 0, 0] = math.nan
    found = subject.submit(images, PROMPTS).result()
    assert found.weights == {"constant": 0.25}
    assert found.reward[:3].tolist() == [0.5] * 3
    assert found.reward[3].isnan()
    assert {k: v[:1].tolist() for k, v in found.parts().items()} == {"constant": [0.5]}
    # The second sample of one reward, and the broken image of both.
    assert (subject.scored, subject.failures_seen, subject.broken_media) == (4, 2, 1)
    assert subject.seconds > 0
    subject.reset()
    assert (subject.scored, subject.failures_seen, subject.broken_media, subject.seconds) == (0, 0, 0, 0)  # fmt: skip
    subject.iteration = None
    assert subject.score(IMAGES, PROMPTS).weights == {"constant": 0.5}
    assert subject._seen == [], "kept for rewards that learn only"


class Cuda:
    """Stands in for ``torch.cuda``: notes what happens, and on which stream."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.current = "default"

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 1

    def current_stream(self) -> "Cuda":
        return self

    def record_event(self) -> str:
        self.noted.append(f"record on {self.current}")
        return "event"

    def Stream(self, device: int) -> "Cuda":
        self.noted.append(f"stream of {device}")
        return self

    @contextmanager
    def stream(self, stream: "Cuda") -> Iterator[None]:
        self.current = "own"
        yield
        self.current = "default"

    def wait_event(self, event: str) -> None:
        self.noted.append(f"{self.current} waits for {event}")

    def synchronize(self) -> None:
        self.noted.append(f"synchronize {self.current}")


def test_rewards_run_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnStream()
    assert own.doing(calls.clear) == calls.clear  # without CUDA
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)

    def work() -> str:
        cuda.noted.append(f"work on {cuda.current}")
        return "scores"

    def fails() -> None:
        raise RewardError("no scores")

    first, second = own.doing(work), own.doing(fails)
    assert cuda.noted == ["stream of 1", "record on default", "record on default"]
    cuda.noted.clear()
    assert first() == "scores"
    with pytest.raises(RewardError):
        second()
    assert cuda.noted == [
        "own waits for event", "work on own", "synchronize own",
        "own waits for event", "synchronize own",
    ]  # fmt: skip
