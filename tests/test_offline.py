"""Training on given pictures and on pairs: the losses, the files, encoded pictures, and whole runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImageImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import Pairs, Pictures
from flowgrpo.cli import main
from flowgrpo.config import ConfigError
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.examples import read_examples, smaller_than
from flowgrpo.data.prompt_files import PromptError
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.data.votes import Ballot, Pair, Shown, Vote, VoteBook, file_name, save_picture
from flowgrpo.evaluation.card import model_card
from flowgrpo.losses.dpo import DPOLoss, pairs_of
from flowgrpo.losses.supervised import SupervisedLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.picture_encoder import _decoder, _pixels, _spied, as_tensor, fit
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.shapes.architecture import build_pipeline
from flowgrpo.training import checkpoints
from scripts.shape_pictures import write_examples
from tests.conftest import MakePolicy, sampling_of
from tests.strict import read_strictly
from tests.test_matching import NOISE, SAMPLE, inputs, of_errors

# Losses.


def test_dpo_equals_the_vector() -> None:
    """Errors .30 and .50, of the reference .32 and .45, beta 10: the margin is .35."""
    given = inputs(of_errors(0.3, 0.5), of_errors(0.3, 0.5), [1.0, -1.0], of_errors(0.32, 0.45))
    found = DPOLoss(beta=10.0)(given)
    assert found.loss.tolist() == pytest.approx([0.5333821554] * 2, rel=1e-5)
    assert float(found.metrics["dpo/margin"]) == pytest.approx(0.35, rel=1e-4)
    assert float(found.metrics["dpo/chosen_error"]) == pytest.approx(-0.02, rel=1e-3)


def naive_dpo(errors: Tensor, base: Tensor, chosen: int, rejected: int, beta: float) -> Tensor:
    """The released code's loss of one pair: a model difference, a reference difference, a scale of -beta/2."""
    model_difference = errors[chosen] - errors[rejected]
    reference_difference = base[chosen] - base[rejected]
    return -torch.log(torch.sigmoid(-0.5 * beta * (model_difference - reference_difference)))


def test_dpo_of_a_batch_is_that_of_its_pairs_and_the_mean_over_actions_is_over_pairs() -> None:
    """Two pairs in mixed order, and a group of four (online DPO) whose best and worst are a pair."""
    numbers = [0.3, 0.5, 0.4, 0.2, 0.6, 0.45, 0.35, 0.25]
    now, base = of_errors(*numbers).requires_grad_(), of_errors(*[e + 0.01 * i for i, e in enumerate(numbers)])  # fmt: skip
    group, advantage = torch.tensor([3, 5, 5, 3, 7, 7, 7, 7]), [-1.0, 1.0, -1.0, 1.0, 0.2, -1.5, 1.1, 0.2]  # fmt: skip
    found = DPOLoss(beta=8.0)(inputs(now, now.detach(), advantage, base, group=group))
    target = (NOISE - SAMPLE)[0]
    errors, others = ((v - target).square().mean(1) for v in (now, base))
    pairs = [naive_dpo(errors, others, w, r, 8.0) for w, r in ((3, 0), (1, 2), (6, 5))]
    wanted = torch.stack([pairs[0], pairs[1], pairs[1], pairs[0], now.new_zeros(()), pairs[2], pairs[2], now.new_zeros(())])  # fmt: skip
    torch.testing.assert_close(found.loss, wanted)
    (gradient,) = torch.autograd.grad(found.loss[:4].mean(), now, retain_graph=True)
    (naive,) = torch.autograd.grad(torch.stack(pairs[:2]).mean(), now)
    torch.testing.assert_close(gradient, naive)
    assert gradient[:4].abs().sum() > 0


def test_a_group_without_a_preference_has_no_pair_and_no_loss() -> None:
    equal, one_sided = torch.zeros(3), torch.tensor([0.0, 1.0, 0.5])
    group = torch.zeros(3, dtype=torch.long)
    assert [len(pairs_of(a, group)) for a in (equal, one_sided, -one_sided)] == [0, 0, 0]
    now = of_errors(0.3, 0.4, 0.5)
    assert DPOLoss()(inputs(now, now, [0.0] * 3, now)).loss.tolist() == [0.0] * 3


def test_supervised_is_the_weighted_error_of_the_velocity() -> None:
    loss = SupervisedLoss(kl_coef=0.1)
    found = loss(inputs(of_errors(0.3, 0.5), of_errors(0.3, 0.5), [1.0, 2.0], of_errors(0.4, 0.4)))
    assert found.loss.tolist() == pytest.approx([0.3, 1.0], rel=1e-5)
    assert found.kl is not None
    gap = (0.3**0.5 - 0.4**0.5) ** 2, (0.5**0.5 - 0.4**0.5) ** 2
    assert found.kl.tolist() == pytest.approx(gap, rel=1e-4)
    assert not SupervisedLoss().needs.reference


# Files.


def picture(path: Path, size: tuple[int, int] = (8, 6), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")  # fmt: skip
    return path


def test_pictures_are_read_from_lines_and_from_both_folder_layouts(tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "sub" / "b.jpg", color="blue")
    own = {
        "prompt": "a cat",
        "picture": "a.png",
        "weight": 2,
        "tag": "x",
        "height": 64,
        "width": 32,
    }
    hub = {"file_name": "sub/b.jpg", "text": "a dog", "negative_prompt": "blur"}
    first, second = read_examples(lines(tmp_path / "mine.jsonl", own, hub), 1)
    assert (first.text, first.targets, first.weight, first.size) == ("a cat", (a,), 2.0, (64, 32, None))  # fmt: skip
    assert first.metadata == {"tag": "x"}
    assert (second.text, second.negative, second.targets) == ("a dog", "blur", (b,))
    assert second.metadata == {}
    assert second.open_targets()[0].size == (8, 6)

    lines(tmp_path / "metadata.jsonl", hub)
    assert read_examples(tmp_path, 1) == [second]
    captioned = tmp_path / "captioned"
    picture(captioned / "1.png")
    picture(captioned / "0.webp")
    for name, text in (("0.txt", "a red\nbox\n"), ("1.txt", "more")):
        (captioned / name).write_text(text)
    found = read_examples(captioned, 1)
    assert [(p.text, p.targets[0].name) for p in found] == [("a red box", "0.webp"), ("more", "1.png")]  # fmt: skip
    assert smaller_than(found, 6, 8) == 0
    assert smaller_than(found, 7, 8) == 2


@pytest.mark.parametrize(
    "names",
    [("chosen", "rejected"), ("preferred", "other"), ("chosen_file_name", "rejected_file_name")],
)
def test_pairs_are_read_by_all_names(names: tuple[str, str], tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", color="blue")
    line = {names[1]: "b.png", "caption": "a cat", names[0]: "a.png"}
    (pair,) = read_examples(lines(tmp_path / "pairs.jsonl", line), 2)
    assert (pair.text, pair.targets, pair.metadata) == ("a cat", (a, b), {})


def test_votes_are_pairs_without_ties_and_the_written_pairs_are_the_same(tmp_path: Path) -> None:
    colors = ("red", "blue", "green", "white")
    drawn = [Image.new("RGB", (8, 8), color) for color in colors]
    for one in drawn:
        save_picture(tmp_path, one)
    shown = [Shown("run", file_name(one)) for one in drawn]
    ballot = Ballot(tmp_path, 0, [Pair("a box", shown[0], shown[1]), Pair("a cup", shown[2], shown[3])])  # fmt: skip
    ballot.write()
    book = VoteBook(ballot)
    for vote in (Vote(0, "ann", "second"), Vote(1, "ann", "tie"), Vote(1, "bob", "first"), Vote(0, "bob", "skip")):  # fmt: skip
        book.add(vote, "first")
    book.write_pairs()
    found = read_examples(tmp_path, 2)
    wanted = [("a box", shown[1], shown[0]), ("a cup", shown[2], shown[3])]
    assert [(p.text, *(t.name for t in p.targets)) for p in found] == [(t, a.file, b.file) for t, a, b in wanted]  # fmt: skip
    assert read_examples(tmp_path / "votes.jsonl", 2) == found
    assert read_examples(tmp_path / "pairs.jsonl", 2) == found
    with pytest.raises(
        PromptError, match=r"votes on pairs of pictures: use algorithm.kind = 'pairs'"
    ):
        read_examples(tmp_path, 1)


@pytest.mark.parametrize(
    ("record", "pictures", "message"),
    [
        ({"prompt": "a", "picture": "no.png"}, 1, r"line 2: there is no picture .*no.png"),
        ({"prompt": "a", "picture": "broken.png"}, 1, r"line 2: picture .*broken.png cannot be read"),
        ({"prompt": "a", "picture": "deep.png"}, 1, r"line 2: .*more than 8 bits"),
        ({"prompt": " ", "picture": "a.png"}, 1, r"line 2: 'prompt' must be some text"),
        ({"picture": "a.png"}, 1, r"line 2: needs a key 'prompt' with some text; keys there: picture"),
        ({"prompt": "a", "pictur": "a.png"}, 1, r"line 2: needs 'picture'; did you mean 'picture'\?"),
        ({"prompt": "a", "picture": 3}, 1, r"line 2: 'picture' must be the name of a file, got 3"),
        ({"prompt": "a", "picture": "a.png", "weight": 0}, 1, r"line 2: 'weight' must be a number above 0"),
        ({"prompt": "a", "picture": "a.png", "heigth": 8}, 1, r"line 2: unknown key 'heigth'; did you mean 'height'"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "b.png"}, 1, r"a pair of pictures; train on it with algorithm.kind = 'pairs'"),
        ({"prompt": "a", "picture": "a.png"}, 2, r"a single picture; train on it with algorithm.kind = 'pictures'"),
        ({"prompt": "a", "chosen": "a.png"}, 2, r"line 2: needs 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "a.png"}, 2, r"are the same picture"),
        ("not json\n", 1, r"line 2: not valid JSON"),
        ("[1]\n", 1, r"line 2: expected an object, got \[1\]"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_number(
    record: Any, pictures: int, message: str, tmp_path: Path
) -> None:
    a, _ = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", color="blue")
    (tmp_path / "broken.png").write_bytes(a.read_bytes()[:50])
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    good = {"prompt": "a", "picture": "a.png"} if pictures == 1 else {"prompt": "a", "chosen": "a.png", "rejected": "b.png"}  # fmt: skip
    with pytest.raises(PromptError, match=message):
        read_examples(lines(tmp_path / "given.jsonl", good, record), pictures)


def test_bad_folders_and_files_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    refused: dict[tuple[Path, int], str] = {
        (tmp_path, 1): r"no a.txt with its prompt beside it",
        (tmp_path, 2): "a folder of pairs needs a file metadata.jsonl",
        (lines(tmp_path / "e.jsonl"), 2): "no pairs of pictures in it",
        (lines(tmp_path / "prompts.csv"), 1): "are read from .jsonl files",
    }
    for (source, number), message in refused.items():
        with pytest.raises(PromptError, match=message):
            read_examples(source, number)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(PromptError, match=r"is empty; write the prompt of a.png"):
        read_examples(tmp_path, 1)
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none.jsonl", 1)


# Encoded pictures.

PICTURE = Image.effect_noise((40, 30), 90).convert("RGB")
PROMPT = Prompt("a red cube")
SCALED: dict[str, tuple[float, float]] = {
    "sd15": (0.18215, 0.0), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159),
}  # fmt: skip
"""Factor and shift of the latents of published models: ``state = factor * (latents - shift)``."""


def latents_of(policy: PipelinePolicy) -> Tensor:
    """The mode of the VAE's posterior for the picture at the policy's size."""
    layout = policy.pictures.layout(PROMPT)
    pixels = _pixels(policy.pipeline, [fit(PICTURE, layout.height, layout.width)])
    pixels = pixels.unsqueeze(2) if len(layout.latent) == 4 else pixels
    with torch.no_grad():
        encoded: Tensor = _decoder(policy.pipeline).encode(pixels).latent_dist.mode()
    return encoded


def packed(policy: PipelinePolicy, latents: Tensor) -> Tensor:
    """The loop's state of unscaled latents, by the functions with which diffusers makes it."""
    pipeline = policy.pipeline
    name = type(pipeline).__name__
    if isinstance(pipeline, Flux2KleinPipeline):
        layout = policy.pictures.layout(PROMPT)
        pixels = _pixels(pipeline, [fit(PICTURE, layout.height, layout.width)])
        with torch.no_grad():
            return pipeline._pack_latents(pipeline._encode_vae_image(pixels, None))
    if name == "QwenImagePipeline":
        mean, std = (torch.tensor(pipeline.vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))  # fmt: skip
        scaled = (latents - mean) / std
        pack = QwenImageImg2ImgPipeline._pack_latents
        return pack(scaled, 1, scaled.shape[1], *scaled.shape[-2:])
    factor, shift = SCALED[{"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3"}.get(name, "flux")]  # fmt: skip
    scaled = factor * (latents - shift)
    if isinstance(pipeline, FluxPipeline):
        return FluxPipeline._pack_latents(scaled, 1, *scaled.shape[1:])
    return scaled


@pytest.mark.parametrize("family", [*SCALED, "flux2_klein", "qwen_image"])
def test_states_of_pictures_are_those_of_diffusers(family: str, make_policy: MakePolicy) -> None:
    policy = make_policy(family, weights=None)
    latents = latents_of(policy)
    found = policy.pictures.layout(PROMPT).states(latents)
    torch.testing.assert_close(found, packed(policy, latents), atol=2e-5, rtol=2e-5)
    assert policy.num_decodes == policy.num_evaluations == 0


@pytest.mark.parametrize("family", ["sd3", "sd15", "flux"])
def test_pictures_are_noised_on_the_grid_of_training_after_an_evaluation(
    family: str, make_policy: MakePolicy
) -> None:
    """An evaluation with other steps leaves another grid behind, on which the times would be wrong."""
    policy, stream = make_policy(family, weights=None), [Random(3)]
    first = policy.pictures.encode([PROMPT], [PICTURE], stream)
    own = [policy.scheduler.interval(k, k + 1) for k in range(policy.num_steps())]
    for steps in (policy.num_steps() + 3, 2):
        noise = SampleNoise([Random(1)])
        policy.images([PROMPT], noise, replace(policy.sampling, num_steps=steps))
        before = policy.num_evaluations
        assert torch.equal(policy.pictures.encode([PROMPT], [PICTURE], stream), first)
        assert policy.num_evaluations == before
        assert [policy.scheduler.interval(k, k + 1) for k in range(policy.num_steps())] == own
    # Nothing is called if the grid is the right one.
    policy.run = None  # type: ignore[method-assign, assignment]
    policy.pictures.encode([PROMPT], [PICTURE], stream)


@pytest.mark.parametrize("family", ["sana", "lumina2", "cogvideox", "ltx"])
def test_the_vae_decodes_what_it_encoded(family: str, make_policy: MakePolicy) -> None:
    """The pipeline hands its VAE the posterior's sample of the picture when the state is decoded."""
    sampling = replace(sampling_of(family), num_frames=None if family in ("sana", "lumina2") else 1)
    policy = make_policy(family, weights=None, sampling=sampling)
    layout, stream = policy.pictures.layout(PROMPT), Random(5)
    state = policy.pictures.encode([PROMPT], [PICTURE], [stream])
    fitted = fit(PICTURE, layout.height, layout.width)
    drawn = policy.pictures._latents([fitted], layout, [stream])
    with _spied(policy.pipeline) as spy:
        media, decoded = spy.decoding(policy, PROMPT, state)
    torch.testing.assert_close(decoded, drawn, atol=1e-5, rtol=1e-5)
    assert media.shape[-2:] == (layout.height, layout.width)
    another = policy.pictures.encode([PROMPT], [PICTURE], [Random(6)])
    # Sana's autoencoder has no posterior.
    assert torch.equal(another, state) == (family == "sana")


def test_a_batch_of_pictures_equals_each_alone(make_policy: MakePolicy) -> None:
    policy = make_policy("sd15", weights=None, batch_size=2)
    others = [PICTURE, PICTURE.rotate(90), PICTURE.resize((16, 16))]
    streams = [Random(i) for i in range(3)]
    together = policy.pictures.encode([PROMPT] * 3, others, streams)
    alone = [policy.pictures.encode([PROMPT], [p], [s]) for p, s in zip(others, streams, strict=True)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_pictures_cover_the_size_and_are_cropped_at_the_centre() -> None:
    striped = Image.new("RGB", (30, 10), "red")
    striped.paste("blue", (10, 0, 20, 10))
    found = fit(striped, 20, 20)
    assert found.size == (20, 20)
    pixels = as_tensor(found)
    torch.testing.assert_close(pixels[:, 10, 10], torch.tensor([0.0, 0.0, 1.0]))
    assert as_tensor(fit(striped, 10, 30)).equal(as_tensor(striped))


def test_a_pipeline_whose_states_cannot_be_known_is_refused(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnsupportedPipelineError, match=r"LTX2Pipeline .* 1024 numbers, and the state"
    ):
        make_policy("ltx2", weights=None, sampling=replace(sampling_of("ltx2"), num_frames=1)).pictures.layout(PROMPT)  # fmt: skip
    with pytest.raises(UnsupportedPipelineError, match=r"frames, and pictures have one: set sampling.num_frames = 1"):  # fmt: skip
        make_policy("wan_t2v", weights=None).pictures.layout(PROMPT)
    policy = make_policy("sd15", weights=None)
    decode = policy.decode
    monkeypatch.setattr(policy, "decode", lambda prompts, x: decode(prompts, x.abs()))
    with pytest.raises(UnsupportedPipelineError, match="not a rearrangement of the last state"):
        policy.pictures.layout(PROMPT)
    monkeypatch.undo()
    policy.pictures.layout(PROMPT)
    policy.pipeline.image_processor = None
    with pytest.raises(UnsupportedPipelineError, match="it has no image processor"):
        policy.pictures.encode([PROMPT], [PICTURE], [Random(0)])


# The collector.


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("pairs"), "pairs", 24)


@pytest.mark.parametrize("family", ["sd3", "sd15", "prx_pixel"])
def test_a_pair_gets_one_time_and_one_noise_whatever_the_process(
    family: str, make_policy: MakePolicy, pairs: Path
) -> None:
    policy = make_policy(family, weights=None)
    groups = PromptSet.load(pairs, num_targets=2).groups(0, 6, Random(0))
    algorithm = Pairs(distinct_times=3, empty_prompts=0.5)
    scorer = RewardScorer([])
    whole = algorithm.collect(policy, groups, scorer, Random(1), 0)
    a = whole.actions
    assert torch.equal(a.sample, torch.tensor([0, 1] * 6))
    assert algorithm.advantages(whole).tolist() == [1.0, -1.0] * 6
    steps = a.step.view(6, 2)
    assert torch.equal(steps[:, 0], steps[:, 1])
    assert len(steps.unique()) == 3
    assert torch.equal(steps[:3], steps[3:])
    noise = []
    for i in range(12):
        interval = policy.scheduler.interval(int(a.step[i]), int(a.step[i]) + 1)
        noise.append((a.states[int(a.state[i])] - interval.signal * a.x_next[i]) / interval.noise)
    for w, r in zip(noise[::2], noise[1::2], strict=True):
        torch.testing.assert_close(w, r, atol=1e-4, rtol=0)
    wanted = policy.pipeline.config.get("noise_scale", 1.0)  # 2 for PRX in pixel space
    assert float(torch.stack(noise).std()) == pytest.approx(wanted, rel=0.1)
    assert (noise[0] - noise[2]).abs().mean() > 0.5
    texts = [g.prompt.text for g in whole.groups]
    assert 0 < texts.count("") < 6
    assert whole.cost == algorithm.cost(4, 0, Random(0))
    # Two processes, the second with half of the groups.
    half = algorithm.collect(policy, groups[3:], scorer, Random(1), 0).actions
    torch.testing.assert_close(half.states[half.state], a.states[a.state[6:]], atol=1e-5, rtol=1e-5)
    assert torch.equal(half.step, a.step[6:])
    assert scorer.scored == 0
    scorer.close()


@pytest.mark.parametrize(("times", "mean", "std"), [("uniform", 0.5, 12**-0.5), ("logit_normal", 0.5, 0.2083)])  # fmt: skip
@pytest.mark.parametrize("distinct", [0, 8])
def test_times_have_their_distribution(times: Any, mean: float, std: float, distinct: int) -> None:
    """The mean and the standard deviation of a uniform and of a logit-normal number."""
    algorithm = Pictures(times=times, distinct_times=distinct)
    drawn = [(algorithm._time(i, 1000, Random(s)) + 0.5) / 1000 for s in range(150) for i in range(8)]  # fmt: skip
    values = torch.tensor(drawn)
    assert float(values.mean()) == pytest.approx(mean, abs=4 * std / 1200**0.5)
    assert float(values.std()) == pytest.approx(std, rel=0.08)
    assert 0 < min(drawn) < max(drawn) < 1
    if distinct and times == "uniform":  # one in each eighth
        assert [int(8 * d) for d in drawn[:8]] == list(range(8))


def test_a_share_of_examples_has_an_empty_prompt() -> None:
    algorithm, groups = Pictures(empty_prompts=0.2), [Group(i, Prompt("a cat")) for i in range(400)]
    texts = [algorithm._group(g, Random(0)).prompt.text for g in groups]
    assert texts.count("") / 400 == pytest.approx(0.2, abs=0.06)
    assert texts.count("") + texts.count("a cat") == 400


# Configurations and runs.

SMALL = [
    "sampling.num_steps=4", "train.groups=4", "train.updates=2", "train.iterations=2", "prompts.balance=''",
    "train.lr=1e-3", "evaluation.images=2", "evaluation.every=0", "evaluation.grid_prompts=1",
    "evaluation.grid_samples=1", "evaluation.regimes=[]", "evaluation.metrics=[]", "run.trackers=[]",
    "run.threads=1", "run.device='cpu'", "run.checkpoint_every=1",
]  # fmt: skip
DPO = ["algorithm={kind='pairs'}", "loss={kind='dpo', beta=100.0}"]
SFT = ["algorithm={kind='pictures'}", "loss={kind='supervised'}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*SFT, "loss={kind='dpo'}"], "compares pictures of one prompt"),
        ([*DPO, "loss={kind='supervised'}"], "train away from rejected pictures"),
        ([*DPO, "train.refill=1"], "train.refill works on the rewards of an iteration"),
        ([*DPO, "guard={novelty='relative', features='clip_score'}"], "guard works on the rewards of an iteration"),
        ([*DPO, "train.staleness=1"], "train.staleness works on the rewards of an iteration"),
        ([*DPO, "train.train_batch=1"], "set train.train_batch to at least algorithm.group_size = 2"),
        ([*DPO, "algorithm.empty_prompts=1.0"], r"empty_prompts must be in \[0, 1\)"),
        ([*DPO, "loss.beta=0"], "loss.beta must be at least"),
        ([*SFT, "loss={kind='clipped'}"], "do not belong together"),
        (["rewards=[]"], "rewards: there are none, and the algorithm trains on them"),
    ],
)  # fmt: skip
def test_contradictions_are_found_before_anything_is_loaded(settings: list[str], message: str) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        flowgrpo.load("quickstart_flow_grpo", settings).check()


def test_training_needs_a_scale_of_guidance(tmp_path: Path) -> None:
    config = flowgrpo.load("quickstart_flow_grpo", DPO)
    config = replace(config, sampling=replace(config.sampling, guidance_scale=None))
    with pytest.raises(ConfigError, match=r"sampling.guidance_scale: set it .* 1.0 trains the model itself"):  # fmt: skip
        config.check()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_pipeline().save_pretrained(folder)
    return folder


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_pairs_train_without_a_reward_and_resume_bit_equal(
    untrained: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, *DPO, "rewards=[]", f"model.path='{untrained}'", f"prompts.train='{pairs}'"]
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    arguments = ["train", "quickstart_flow_grpo", *(f"--set={s}" for s in settings)]
    assert main([*arguments, f"--set=run.folder='{straight}'"]) == 0
    said = capsys.readouterr().out
    assert "training on 24 pairs of 64 x 64 pixels, 0.333 passes in 2 iterations" in said
    assert main([*arguments, f"--set=run.folder='{halted}'", "--set=train.iterations=1"]) == 0
    assert main(["train", str(halted), "--resume-with", "train.iterations=2"]) == 0
    one, two = (checkpoints.newest(f / "checkpoints") for f in (straight, halted))
    assert one is not None
    assert two is not None
    for part in ("weights", "optimizer"):
        first, second = (load_file(f / f"{part}.safetensors") for f in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)
    read_strictly(straight)
    metrics, others = records(straight), records(halted)
    assert "reward" not in metrics[0]
    assert "score/strict" not in metrics[0]
    assert [m["loss/policy"] for m in metrics] == [m["loss/policy"] for m in others]
    assert (straight / "report.html").is_file()
    assert "Trained on pairs of a chosen and a rejected picture." in str(model_card(straight, "me/mine"))  # fmt: skip
    assert main(["inspect", str(straight)]) != 0
    assert "trained on given pictures" in capsys.readouterr().err


def test_pictures_train_and_a_reward_is_measured_only(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_examples(tmp_path / "given", "pictures", 12).parent
    (source / "examples.jsonl").rename(source / "metadata.jsonl")
    run = tmp_path / "run"
    settings = [*SMALL, *SFT, f"model.path='{untrained}'", f"prompts.train='{source}'", "train.updates=1", f"run.folder='{run}'"]  # fmt: skip
    config = flowgrpo.load("quickstart_flow_grpo", settings)
    assert flowgrpo.train(config).finished
    metrics, (evaluation, *_) = records(run), records(run, "evaluations.jsonl")
    assert all(m["loss/policy"] > 0 and m["nfe_per_prompt"] == 0 for m in metrics)
    assert "strict" in evaluation["scores"]
    assert not any(k.startswith("score/") for k in metrics[0])
    # A picture more is another training set.
    picture(source / "pictures" / "more.png")
    with pytest.raises(ConfigError, match=r"prompts\.train"):
        flowgrpo.train(flowgrpo.load("quickstart_flow_grpo", [*settings, "train.iterations=3"]))


def test_a_dry_run_reads_the_pictures(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL, *DPO, "rewards=[]", f"prompts.train='{pairs}'"]
    assert (
        main(["train", "quickstart_flow_grpo", "--dry-run", *(f"--set={s}" for s in settings)]) == 0
    )
    said = capsys.readouterr().out
    assert "4 examples x 2 pictures = 8 per iteration" in said
    assert "24 (" in said
    first = json.loads(pairs.read_text().splitlines()[0])
    broken = lines(pairs.with_name("broken.jsonl"), {**first, "chosen": "gone.png"})
    assert main(["train", "quickstart_flow_grpo", "--dry-run", *(f"--set={s}" for s in settings), f"--set=prompts.train='{broken}'"]) != 0  # fmt: skip
    assert "broken.jsonl, line 1: there is no picture" in capsys.readouterr().err
