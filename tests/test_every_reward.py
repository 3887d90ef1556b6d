"""What every reward owes, on the tiny folders that the benchmark measures; and what servers may do."""

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reward_cases import TINY, Case
from benchmarks.reward_throughput import PROMPT
from flowgrpo.cli import main
from flowgrpo.data.pictures import encode_png
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.serving.server import RewardServer
from flowgrpo.rewards.settings import Failures, Reward
from reward_models.adversarial import Adversarial
from reward_models.clip_score import CLIPScore
from reward_models.dino import DINOSimilarity
from reward_models.edit_verifier import EditVerifier
from reward_models.geneval import GenEval
from reward_models.remote import Remote
from reward_models.vlm_judge import VLMJudge
from reward_models.vlm_pairwise import VLMPairwise
from tests import zoo
from tests.stub_vlm import Stub, said

SILENT = ("unified_reward", "video_score2")
"""Their tiny models say nothing that is a score; they have tests of their own."""
TEXTS = ('a red sign that says "hi"', 'two blue cats and "no"', 'a photo of a dog, "hi"')


def loaded(name: str, folder: Path, **more: Any) -> tuple[Any, Case]:
    case = TINY[name](folder)
    with_device = {"device": "cpu"} if case.precisions else {}
    options = {**case.options, **with_device, **more}
    return load_reward(Reward(model=case.model, options=options)), case


def media_of(case: Case, number: int = 3) -> Tensor:
    return zoo.films(number, 4, 48, 64) if case.video else zoo.noise(number, 48, 64)


def prompts() -> list[Prompt]:
    return [Prompt(t, metadata=PROMPT.metadata) for t in TEXTS]


@pytest.fixture(autouse=True)
def _open_clip_forgets() -> Iterator[None]:
    """Architectures of folders that are gone."""
    from open_clip import factory

    before = list(factory._MODEL_CONFIG_PATHS)
    yield
    if before != factory._MODEL_CONFIG_PATHS:
        factory._MODEL_CONFIG_PATHS[:] = before
        factory._rescan_model_configs()


@pytest.mark.parametrize("name", TINY)
def test_bad_input_is_refused_and_order_and_batches_do_not_matter(
    name: str, tmp_path: Path
) -> None:
    reward, case = loaded(name, tmp_path)
    media, own = media_of(case), prompts()
    for bad, problem in (
        (media * 255, r"must be in \[0, 1\]"),
        (media * 2 - 1, r"must be in \[0, 1\]"),
        ((media * 255).to(torch.uint8), "floating-point|Type-check"),
        (media[..., :0], "of size zero"),
        (media[..., :1, :, :], "floating-point|Type-check"),
        (media[:2], "2 media for 3 prompts"),
    ):
        if case.model.startswith("flowgrpo.rewards.frames") and len(bad) == 2:
            continue  # the frames are counted, not the videos
        with pytest.raises((ValueError, TypeCheckError), match=problem):
            reward(bad, own)
    if name in SILENT:
        return
    together = reward(media, own)
    assert together.shape == (3,)
    assert together.isfinite().all()
    order = [2, 0, 1]
    shuffled = reward(media[order], [own[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=2e-3)
    alone = torch.cat([reward(m[None], [p]) for m, p in zip(media, own, strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-3)
    broken = media.clone()
    broken[1].view(-1)[7] = math.nan
    scores = reward(broken, own)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], together[[0, 2]], rtol=0, atol=2e-3)


def test_geneval_runs_in_16_bits(tmp_path: Path) -> None:
    dtype = "bfloat16"  # a processor takes minutes over half precision
    reward, case = loaded("geneval", tmp_path, dtype=dtype)
    assert isinstance(reward, GenEval)
    assert str(next(reward.detector.model.parameters()).dtype) == f"torch.{dtype}"  # type: ignore[attr-defined]
    assert str(next(reward.colors.model.parameters()).dtype) == f"torch.{dtype}"
    colored = Prompt("x", metadata={**PROMPT.metadata, "tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}]})  # fmt: skip
    assert reward(media_of(case), [*prompts()[:2], colored]).isfinite().all()


# Weights.
@pytest.mark.parametrize("kind", [DINOSimilarity, Adversarial])
@pytest.mark.parametrize(("drop", "add"), [("layernorm.weight", ""), ("", "extra.weight")])
def test_dinos_with_other_weights_are_refused(
    tmp_path: Path, kind: Callable[..., Any], drop: str, add: str
) -> None:
    file = zoo.save_dino(tmp_path) / "model.safetensors"
    state = load_file(file)
    state.pop(drop, None)
    save_file(state | ({add: torch.zeros(2)} if add else {}), file, metadata={"format": "pt"})
    size = {"crop": 28} if kind is DINOSimilarity else {"side": 28}
    with pytest.raises(ValueError, match=f"1 weights are .*{drop or add}"):
        kind(str(tmp_path), device="cpu", **size)


def test_clip_score_refuses_missing_and_left_over_weights(tmp_path: Path) -> None:
    file = zoo.save_open_clip(tmp_path) / "open_clip_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "text_projection"}, file)
    with pytest.raises(RuntimeError, match="text_projection"):
        CLIPScore(f"local-dir:{tmp_path}", device="cpu")
    save_file(state | {"rm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(RuntimeError, match="rm_head"):
        CLIPScore(f"local-dir:{tmp_path}", device="cpu")
    file.unlink()
    with pytest.raises((RuntimeError, FileNotFoundError)):
        CLIPScore(f"local-dir:{tmp_path}", device="cpu")


# Pictures that go to others.
@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (torch.rand(3, 4, 4) * 255, r"must be in \[0, 1\]"),
        (torch.rand(3, 4, 4) * 2 - 1.5, r"must be in \[0, 1\]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "floating-point|Type-check"),
        (torch.zeros(1, 4, 4), "floating-point|Type-check"),
        (torch.zeros(3, 0, 4), "size zero"),
        (torch.full((3, 4, 4), math.nan), "not finite"),
    ],
)
def test_pictures_that_cannot_be_meant_are_not_sent(image: Tensor, problem: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=problem):
        encode_png(image)


def test_judges_that_see_refuse_them_too() -> None:
    media, own = torch.rand(2, 3, 6, 6) * 255, [Prompt("a", images=[zoo.pil(torch.rand(1, 3, 4, 4))[0]])] * 2  # fmt: skip
    principles = [{"kind": "follow", "text": "x"}]
    edits = [Prompt("a", metadata={"principles": principles}, images=p.images) for p in own]
    with Stub(lambda _: said("Yes", {"Yes": 1.0})) as stub:
        for call in (
            lambda: VLMJudge("tiny", stub.url)(media, own),
            lambda: VLMPairwise("tiny", stub.url).compare(media, media, own),
            lambda: EditVerifier("tiny", stub.url)(media, edits),
        ):
            with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
                call()
        assert not stub.questions


# Servers that fail in the middle.
class Breaking:
    """Answers ``/healthz``; to the first requests for scores it says other things."""

    def __init__(self, *answers: bytes):
        self.answers = list(answers)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                head = b"".join(iter(stream.readline, b"\r\n"))
                length = [x for x in head.split(b"\r\n") if x.startswith(b"Content-Length")]
                stream.read(int(length[0].split(b":")[1]) if length else 0)
                good = b'{"scores": [0.5, 0.25]}'
                if head.startswith(b"GET"):
                    good = b'{"status": "ok", "reward": "x"}'
                elif self.answers:
                    connection.sendall(self.answers.pop(0))
                    continue
                reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(good)
                connection.sendall(reply + good)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n"


@pytest.mark.parametrize(
    "answer", [b"", OK, OK + b'{"scores": [0.5', b"HTTP/1.1 200 OK\r\nContent-Le", b"nonsense\r\n\r\n"]
)  # fmt: skip
def test_a_server_that_dies_in_the_middle_of_its_answer_is_asked_again(answer: bytes) -> None:
    server = Breaking(answer)
    client = Remote(server.url, timeout=10.0, patience=10.0, token_env="")
    scores = client(zoo.noise(2, 8, 8), prompts()[:2])
    server.socket.close()
    assert not server.answers
    assert scores.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    "body",
    [
        b"[1, 2]", b'{"scores": 3}', b'{"scores": [1]}', b'{"scores": ["1", "2"]}',
        b'{"scores": [true, false]}', b"\xff\xfe", b'{"scores": [1, ' + b"9" * 5000 + b"]}",
    ],
)  # fmt: skip
def test_garbage_for_an_answer_is_no_score(body: bytes) -> None:
    server = Breaking(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    client = Remote(server.url, timeout=10.0, patience=1.0, token_env="")
    with pytest.raises(RuntimeError, match="the reward server failed"):
        client(zoo.noise(2, 8, 8), prompts()[:2])
    server.socket.close()


def leaves(media: Tensor, prompts: list[Prompt]) -> Tensor:
    raise SystemExit("I am done")


def test_a_reward_that_wants_to_leave_is_an_error_and_the_server_stays() -> None:
    with RewardServer(leaves) as running:  # type: ignore[arg-type]
        client = Remote(running.url, timeout=10.0, patience=1.0, token_env="")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="SystemExit: I am done"):
                client(zoo.noise(2, 8, 8), prompts()[:2])


# One reward several times, and rewards in the wrong place.
def test_one_reward_with_several_options(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(zoo.pil(zoo.noise(2, 32, 32))):
        image.save(tmp_path / "images" / f"{i}.png")
    arguments = ["score", str(tmp_path / "images"), "--reward", "jpeg_size", "--reward"]
    out = tmp_path / "scores.jsonl"
    options = ["--reward-option", "coarse.quality=20", "--out", str(out)]
    assert main([*arguments, "coarse=jpeg_size", *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(r["coarse"] > r["jpeg_size"] for r in rows)
    assert main([*arguments, "jpeg_size"]) == 1
    assert main([*arguments, "=jpeg_size"]) == 2


def test_what_learns_is_neither_served_nor_given_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.save_dino(tmp_path)
    options = {"model": str(tmp_path), "side": 28, "device": "cpu"}
    settings = [f"--option={k}={v}" for k, v in options.items()]
    assert main(["serve-reward", "adversarial", "--port", "0", *settings]) == 1
    assert "'adversarial' learns during a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'adversarial' learns from whole samples"):
        load_reward(
            Reward(
                model="flowgrpo.rewards.frames:FrameScore",
                options={"model": "adversarial", "options": options},
            )
        )


# The probe.
def brightness(media: Tensor, prompts: list[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def wild(media: Tensor, prompts: list[Prompt]) -> Tensor:
    return media.flatten(1).std(1)


def blind_to_noise(media: Tensor, prompts: list[Prompt]) -> Tensor:
    scores = brightness(media, prompts)
    return torch.where(wild(media, prompts) > 0.2, math.nan, scores)


@pytest.mark.parametrize(
    ("name", "weight", "words"),
    [
        ("wild", 1.0, "'wild' prefers noise"),
        ("wild", -1.0, ""),
        ("wild", 0.0, ""),
        ("brightness", 1.0, ""),
        ("blind_to_noise", 1.0, "'blind_to_noise' gave no finite score to noise"),
    ],
)
def test_the_probe_shows_rewards_something_senseless(
    name: str, weight: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.linspace(0.1, 0.9, 4).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    images[..., 0] = images[..., 0] + torch.linspace(0, 0.05, 4).view(4, 1, 1)
    rewards = [Reward(model=f"{__name__}:{name}", weight=weight)]
    scorer = RewardScorer(rewards, Failures(retries=0, wait=0.0))
    scorer.probe(images, [Prompt("a")] * 4)
    scorer.close()
    assert (words in caplog.text) if words else ("noise" not in caplog.text)


def test_the_tables_of_the_benchmark_have_their_place() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    assert page.count("<!-- rewards: begin -->") == page.count("<!-- rewards: end -->") == 1
