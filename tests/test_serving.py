"""Reward servers and their client, over real HTTP on loopback."""

import base64
import http.client
import io
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowgrpo.cli import main
from flowgrpo.cli.serve_reward import read_token
from flowgrpo.data.pictures import encode_png
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.serving import client, protocol
from flowgrpo.rewards.serving import server as serving
from flowgrpo.rewards.serving.batching import Batcher
from flowgrpo.rewards.serving.client import Endpoints, Refused
from flowgrpo.rewards.serving.multipart import Part, join
from flowgrpo.rewards.serving.protocol import Limits, Sample, decode_image, pack, unpack
from flowgrpo.rewards.serving.server import RewardServer
from flowgrpo.rewards.settings import Failures, Reward
from reward_models.jpeg_size import JPEGSize
from reward_models.remote import Remote

ROOT = Path(__file__).parents[1]
PROMPTS = [Prompt(f"prompt {i}", metadata={"i": i}) for i in range(8)]
IMAGES = (torch.rand(8, 3, 12, 10, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


class Mean:
    """The mean pixel; NaN for the prompt "nan"; an error for the prompt "error". Notes its calls."""

    def __init__(self, seconds: float = 0.0):
        self.batches: list[int] = []
        self.prompts: list[Prompt] = []
        self.times: list[tuple[float, float]] = []
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        began = time.monotonic()
        self.gate.wait(20)
        time.sleep(self.seconds)
        self.times.append((began, time.monotonic()))
        self.batches.append(len(prompts))
        self.prompts += prompts
        if any(p.text == "error" for p in prompts):
            raise ValueError("a prompt that cannot be scored")
        scores = media.flatten(1).double().mean(1).float()
        return torch.where(torch.tensor([p.text == "nan" for p in prompts]), math.nan, scores)


def wrong_shape(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.zeros(len(prompts), 2)


@pytest.fixture
def reward() -> Mean:
    return Mean()


@pytest.fixture
def server(reward: Mean) -> Iterator[RewardServer]:
    with RewardServer(reward) as running:
        yield running


def remote(url: Any, **options: Any) -> Remote:
    return Remote(url, **{"timeout": 20.0, "patience": 2.0, **options})


def post(
    server: RewardServer, body: bytes, headers: dict[str, str], path: str = "/score"
) -> tuple[int, Any]:
    """Status and JSON of a request that no client of ours would send."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def base64_png(image: Tensor) -> str:
    return base64.b64encode(encode_png(image)).decode()


JSON = {"Content-Type": "application/json"}


# What is sent.
def test_eight_bit_images_arrive_as_they_were():
    kind, body = pack(IMAGES, PROMPTS)
    samples = unpack(kind, body, Limits())
    assert torch.equal(torch.stack([s.media for s in samples]), IMAGES)
    assert [s.prompt for s in samples] == PROMPTS


def test_videos_arrive_as_their_frames():
    videos = IMAGES.view(2, 4, 3, 12, 10)
    samples = unpack(*pack(videos, [Prompt("a", "b"), Prompt("ü\r\n--x")]), Limits())
    assert torch.equal(torch.stack([s.media for s in samples]), videos)
    assert [s.prompt for s in samples] == [Prompt("a", "b"), Prompt("ü\r\n--x")]
    assert unpack(*pack(videos[:, :1], PROMPTS[:2]), Limits())[0].media.shape == (1, 3, 12, 10)


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        encode_png(torch.full((3, 4, 4), math.nan))
    with pytest.raises(ValueError, match=r"metadata of prompt 'p' is not JSON"):
        pack(IMAGES[:1], [Prompt("p", metadata={"x": object()})])


def test_images_of_other_kinds_are_read_as_rgb():
    buffer = io.BytesIO()
    Image.new("LA", (5, 4), (100, 7)).save(buffer, "PNG")
    shade = round(100 * 7 / 255 + 255 * 248 / 255)  # on white
    assert torch.equal(decode_image(buffer.getvalue()), torch.full((3, 4, 5), shade / 255))


# Scoring through a server.
def test_a_served_reward_equals_the_local_one():
    local = JPEGSize()
    with RewardServer(local) as running:
        assert torch.equal(remote(running.url)(IMAGES, PROMPTS), local(IMAGES, PROMPTS))


def test_metadata_and_videos_reach_the_reward(server, reward):
    videos = IMAGES.view(2, 4, 3, 12, 10)
    scores = remote(server.url)(videos, PROMPTS[:2])
    assert torch.allclose(scores, videos.flatten(1).mean(1), atol=1e-6)
    assert reward.prompts == PROMPTS[:2]


def test_failed_samples_are_nan_and_the_others_are_scored(server):
    media = IMAGES.clone()
    media[2, 0, 0, 0] = math.inf
    prompts = [Prompt("nan") if i == 5 else p for i, p in enumerate(PROMPTS)]
    scores = remote(server.url, part=3)(media, prompts)
    assert scores.isnan().nonzero().flatten().tolist() == [2, 5]
    assert torch.allclose(scores[:2], IMAGES[:2].flatten(1).mean(1), atol=1e-6)


def test_a_part_that_the_reward_refuses_is_nan_and_the_reason_is_logged(server, caplog):
    prompts = [Prompt("error") if i == 1 else p for i, p in enumerate(PROMPTS)]
    scores = remote(server.url, part=2)(IMAGES, prompts)
    assert scores.isnan().nonzero().flatten().tolist() == [0, 1]
    assert "2 of 8 samples have no score" in caplog.text
    assert "a prompt that cannot be scored" in caplog.text


def test_if_nothing_is_scored_the_reason_is_raised(server):
    with pytest.raises(
        RuntimeError, match=r"status 422: the reward failed: ValueError: a prompt th"
    ):
        remote(server.url)(IMAGES, [Prompt("error")] * 8)  # fmt: skip


def test_the_reward_scorer_uses_a_server_like_any_reward(server):
    reward = Reward(model="remote", name="mean", options={"url": server.url, "part": 3})
    scorer = RewardScorer([reward], Failures(retries=0))
    assert torch.allclose(
        scorer.score(IMAGES, PROMPTS).reward, IMAGES.flatten(1).mean(1), atol=1e-6
    )
    scorer.close()


def test_a_wrong_shape_is_an_error_that_says_so():
    with (
        RewardServer(wrong_shape) as running,
        pytest.raises(RuntimeError, match=r"returned shape \(8, 2\) for 8 samples"),
    ):
        remote(running.url)(IMAGES, PROMPTS)


# Batching.
def test_requests_that_arrive_together_share_a_call():
    reward = Mean()
    with RewardServer(reward, wait=20.0, max_batch=8) as running:
        scores = remote(running.url, part=1, concurrency=8)(IMAGES, PROMPTS)
    assert reward.batches == [8]
    assert torch.allclose(scores, IMAGES.flatten(1).mean(1), atol=1e-6)


def test_a_batch_is_no_larger_than_allowed_and_of_one_shape():
    reward = Mean()
    batcher = Batcher(reward, max_batch=3, wait=0.0)
    small = [Sample(i[:, :4, :4], p) for i, p in zip(IMAGES, PROMPTS, strict=True)]
    mixed = [s for pair in zip(small, map(Sample, IMAGES, PROMPTS), strict=True) for s in pair]
    scores = batcher.submit(mixed).result()
    batcher.close()
    assert reward.batches == [3, 3, 2, 3, 3, 2]
    assert scores == pytest.approx([float(s.media.mean()) for s in mixed], abs=1e-6)


def test_only_the_request_at_fault_fails():
    batcher = Batcher(Mean(), wait=0.3)
    good = batcher.submit([Sample(IMAGES[0], PROMPTS[0])])
    bad = batcher.submit([Sample(IMAGES[1], Prompt("error"))])
    assert good.result() == pytest.approx([float(IMAGES[0].mean())], abs=1e-6)
    assert isinstance(bad.exception(), ValueError)
    batcher.close()


def test_too_many_waiting_samples_are_refused_until_there_is_room():
    reward = Mean()
    with RewardServer(reward, wait=0.0) as running:
        running.batcher.max_waiting = 4
        reward.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(remote(running.url, part=8), IMAGES, PROMPTS)
            while running.batcher.num_waiting < 8:
                time.sleep(0.01)
            body = json.dumps({"samples": [{"prompt": "", "image": base64_png(IMAGES[0])}]})
            status, answer = post(running, body.encode(), JSON)
            assert (status, answer) == (503, {"error": "8 samples are waiting"})
            # The client waits and comes back.
            second = pool.submit(remote(running.url, patience=20.0), IMAGES, PROMPTS)
            time.sleep(0.2)
            reward.gate.set()
            assert torch.equal(first.result(), second.result())


# What servers refuse.
def test_requests_by_hand_in_json_and_as_a_form(server):
    samples = [
        {"prompt": "a", "image": base64_png(IMAGES[0])},
        {"prompt": "b", "frames": [base64_png(i) for i in IMAGES[1:3]]},
        {"prompt": "nan", "image": base64_png(IMAGES[0])},
    ]
    status, answer = post(server, json.dumps({"samples": samples}).encode(), JSON)
    assert status == 200
    assert answer["scores"] == pytest.approx(
        [float(IMAGES[0].mean()), float(IMAGES[1:3].mean()), None], abs=1e-6
    )
    # As curl -F prompt=a -F image=@a.png sends it.
    head = '--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: application/octet-stream\r\n\r\n'
    body = head.encode() + encode_png(IMAGES[0]) + b"\r\n--x--\r\n"
    status, answer = post(server, body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 200
    assert answer["scores"] == pytest.approx([float(IMAGES[0].mean())], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (pickle.dumps({"images": []}), "application/octet-stream", 415, "send multipart/form-data"),
        (pickle.dumps({"images": []}), "application/json", 400, "expected JSON with a list"),
        (b"[1", "application/json", 400, "expected JSON with a list 'samples'"),
        (b'{"samples": []}', "application/json", 400, "no samples"),
        (b'{"samples": [{"prompt": "a"}]}', "application/json", 400, "needs either 'image' or"),
        (b'{"samples": [{"imege": "a"}]}', "application/json", 400, r"unknown keys \['imege'\]"),
        (b'{"samples": [{"image": "%"}]}', "application/json", 400, "sample 0: no base64"),
        (b'{"samples": [{"image": "AAAA"}]}', "application/json", 400, "no readable image"),
        (b'{"samples": [{"prompt": 1, "image": ""}]}', "application/json", 400, "sample 0: "),
        (b"--x\r\n", "multipart/form-data", 400, "without a boundary"),
        (
            b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"samples": [{"frames": '
            + b"9" * 4300 + b'}, {"frames": ' + b"9" * 4300 + b"}]}\r\n--x--\r\n",
            "multipart/form-data; boundary=x", 400, "'frames' must be the number",
        ),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400, "does not end with its boundary"),
    ],
)  # fmt: skip
def test_malformed_requests(server, body, kind, status, message):
    found, answer = post(server, body, {"Content-Type": kind})
    assert found == status
    assert re.search(message, answer["error"]), answer


def test_images_and_prompts_must_match_in_number(server):
    kind, body = pack(IMAGES[:2], PROMPTS[:2])
    start = body.index(b"--", body.index(b"IEND"))
    boundary = kind.split("=")[1].encode()
    short = body[:start] + b"--" + boundary + b"--\r\n"
    assert post(server, short, {"Content-Type": kind}) == (
        400,
        {"error": "1 images for samples that need 2"},
    )


def test_limits_are_enforced():
    limits = Limits(num_bytes=4000, num_images=2, num_pixels=100)
    reward = Mean()
    with RewardServer(reward, limits=limits) as running:
        for image, number, message in (
            (IMAGES[0], 1, "12 exceeds 100 pixels"),
            (IMAGES[0, :, :4, :4], 3, "3 images exceed the 2"),
            (torch.rand(3, 40, 40), 1, "exceed the 4000"),
        ):
            kind, body = pack(image.expand(number, -1, -1, -1), PROMPTS[:number])
            status, answer = post(running, body, {"Content-Type": kind})
            assert status == 413
            assert message in answer["error"]
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(head)
            assert raw.recv(100).startswith(b"HTTP/1.1 411")
    assert not reward.batches


def test_decoded_size_fields_and_json_values_are_limited(monkeypatch):
    reward, image = Mean(), IMAGES[:1]
    pixels = image.shape[-1] * image.shape[-2]
    kind, body = pack(image.expand(3, -1, -1, -1), PROMPTS[:3])
    with RewardServer(reward, limits=Limits(num_images=3, num_decoded=2 * 12 * pixels)) as running:
        status, answer = post(running, body, {"Content-Type": kind})
        assert (status, "more than" in answer["error"]) == (413, True)
        assert "sample 2: " not in answer["error"]
        kind, body = pack(image.expand(2, -1, -1, -1), PROMPTS[:2])
        assert post(running, body, {"Content-Type": kind})[0] == 200
        kind, body = join([Part("prompt", "text/plain", b"a")] * 8)
        assert post(running, body, {"Content-Type": kind}) == (
            413,
            {"error": "the form has more than 7 fields"},
        )
        monkeypatch.setattr(protocol, "LARGEST_JSON", 100)
        body = b'{"samples": [' + b"{}," * 60 + b"{}]}"
        status, answer = post(running, body, {"Content-Type": "application/json"})
        assert (status, answer["error"]) == (413, "the JSON has more than 100 values")
    assert len(reward.batches) == 1


def test_all_requests_together_may_take_a_limited_memory():
    reward = Mean()
    reward.gate.clear()
    kind, body = pack(IMAGES, PROMPTS)
    needed = len(body) + 12 * IMAGES.shape[0] * IMAGES.shape[-1] * IMAGES.shape[-2]
    limits = Limits(num_reserved=needed + len(body))
    with RewardServer(reward, limits=limits, wait=0.0) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, running, body, {"Content-Type": kind})
        while running.batcher.num_waiting < len(IMAGES):
            time.sleep(0.01)
        assert running.memory.taken == needed
        status, answer = post(running, body, {"Content-Type": kind})
        assert (status, "requests in progress take" in answer["error"]) == (503, True)
        reward.gate.set()
        assert first.result()[0] == 200
        while running.memory.taken:  # given back after the answer
            time.sleep(0.01)
        assert post(running, body, {"Content-Type": kind})[0] == 200
        # Alone, a request that exceeds the limit is answered: it would wait for ever.
        while running.memory.taken:
            time.sleep(0.01)
        running.memory.limit = 1
        assert post(running, body, {"Content-Type": kind})[0] == 200


def test_the_number_of_connections_is_limited():
    with RewardServer(Mean(), limits=Limits(num_connections=2)) as running:
        with connect(running), connect(running) as second, connect(running) as third:
            refused = b"".join(iter(lambda: third.recv(1000), b""))
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"there are 2 connections already" in refused
            second.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert second.recv(1000).startswith(b"HTTP/1.1 200")
        while running._server.server_state.connections:
            time.sleep(0.01)
        assert json.loads(Endpoints(running.url).request("/healthz"))["status"] == "ok"
    with pytest.raises(ValueError, match="at least 1"):
        RewardServer(Mean(), limits=Limits(num_connections=0))


def test_a_token_is_asked_for_and_checked(monkeypatch):
    with RewardServer(Mean(), token="secret") as running:
        kind, body = pack(IMAGES[:1], PROMPTS[:1])
        assert post(running, body, {"Content-Type": kind})[0] == 401
        assert json.loads(Endpoints(running.url).request("/healthz")) == {"status": "ok"}
        monkeypatch.delenv("FLOWGRPO_TOKEN", raising=False)
        with pytest.raises(ValueError, match=r"requires a token.*'FLOWGRPO_TOKEN'"):
            remote(running.url)
        monkeypatch.setenv("FLOWGRPO_TOKEN", "guess")
        with pytest.raises(ValueError, match=r"status 401: wrong token \(the token is read from"):
            remote(running.url)
        monkeypatch.setenv("MINE", "secret")
        assert remote(running.url, token_env="MINE")(IMAGES, PROMPTS).isfinite().all()


def test_other_machines_need_a_token():
    with pytest.raises(ValueError, match=r"'0.0.0.0' is open to other machines: give a token"):
        RewardServer(Mean(), host="0.0.0.0")
    # A colon is the mark of an IPv6 address in a host, and of nothing in a token.
    RewardServer(Mean(), host="0.0.0.0", token="sec:ret").close()


def test_web_pages_are_refused(server):
    kind, body = pack(IMAGES[:1], PROMPTS[:1])
    headers = {"Content-Type": kind, "Origin": "http://example.org"}
    assert post(server, body, headers)[0] == 403
    assert post(server, body, {"Content-Type": kind}, "/other")[0] == 404


def test_what_is_no_request_gets_an_error_in_json_too(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.request("PUT", "/score", b"x")
    response = connection.getresponse()
    assert response.status == 405
    message = "PUT /score: Method Not Allowed; the server has GET /healthz, POST /score and POST"
    assert message in json.loads(response.read())["error"]


def test_errors_with_any_text_are_json_and_not_the_servers_fault():
    """The message of a reward may repeat a prompt, which may hold what UTF-8 cannot encode."""

    class Refusing(Mean):
        def check(self, prompts: Sequence[Prompt]) -> None:
            raise ValueError(f"cannot use {prompts[0].text}")

        def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            raise ValueError(f"cannot score {prompts[0].text}")

    record = {"prompt": "\ud800", "image": base64_png(IMAGES[0])}
    body = json.dumps({"samples": [record]}).encode()
    with RewardServer(Refusing()) as running:
        kind = {"Content-Type": "application/json"}
        status, answer = post(running, body, kind)
        assert (status, answer["error"][-14:]) == (422, "cannot score \ud800")
        assert post(running, body, kind, "/check") == (200, {"problem": "cannot use \ud800"})


def test_a_failure_of_the_server_itself_is_an_error_in_json(server, monkeypatch):
    monkeypatch.setattr(serving, "unpack", lambda *_: 1 / 0)
    status, answer = post(server, b"{}", {"Content-Type": "application/json"})
    assert status == 500
    assert answer == {"error": "the server failed: ZeroDivisionError: division by zero"}


def test_a_path_with_a_slash_too_many_is_not_redirected(server):
    """The redirect would name the host that the request claims to want."""
    assert post(server, b"{}", {"Content-Type": "application/json"}, "/score/")[0] == 404


# Several servers, and servers that go away.
def test_health_counts(server):
    client = remote(server.url)
    client(IMAGES, [Prompt("nan"), *PROMPTS[1:]])
    health = json.loads(client.endpoints.request("/healthz"))
    assert (health["status"], health["reward"]) == ("ok", "Mean")
    assert (health["scored"], health["failed"], health["waiting"]) == (8, 1, 0)


def test_two_servers_share_the_work():
    first, second = Mean(seconds=0.2), Mean(seconds=0.2)
    with RewardServer(first) as a, RewardServer(second) as b:
        client = remote([a.url, b.url], part=2, concurrency=1)
        scores = client(IMAGES, PROMPTS)
    assert sum(first.batches) + sum(second.batches) == 8
    # They worked at the same time.
    assert any(a < d and c < b for a, b in first.times for c, d in second.times)
    assert torch.allclose(scores, IMAGES.flatten(1).mean(1), atol=1e-6)


def test_servers_of_different_rewards_are_refused():
    with (
        RewardServer(Mean(), name="one") as a,
        RewardServer(Mean(), name="two") as b,
        pytest.raises(ValueError, match="different rewards"),
    ):
        remote([a.url, b.url])


def test_if_one_of_two_servers_dies_the_other_does_its_work():
    dying, staying = Mean(), Mean()
    with RewardServer(staying) as b:
        a = RewardServer(dying)
        client = remote([a.url, b.url], part=1, concurrency=1)
        client(IMAGES, PROMPTS)
        assert dying.batches
        assert staying.batches
        a.close()
        done = sum(staying.batches)
        assert client(IMAGES, PROMPTS).isfinite().all()
        assert sum(staying.batches) == done + 8


def test_a_pool_outlives_the_loss_and_the_return_of_a_server(caplog):
    """Three servers; one dies with requests in progress, and another one takes its place later."""
    rewards = [Mean(0.02) for _ in range(3)]
    first, *rest = [RewardServer(reward, drain=0.0) for reward in rewards]
    client = remote([first.url, *(s.url for s in rest)], part=1, concurrency=1, patience=20.0)
    rewards[0].gate.clear()
    held = threading.Timer(0.3, first.close)  # while its first request waits at the gate
    held.start()
    assert torch.equal(client(IMAGES, PROMPTS), IMAGES.flatten(1).double().mean(1).float())
    held.join()
    rewards[0].gate.set()
    assert sum(rewards[1].batches) + sum(rewards[2].batches) == 8
    again = Mean(0.02)
    with RewardServer(again, port=urlsplit(first.url).port), rest[0], rest[1]:
        deadline = time.monotonic() + 30
        while not again.batches:
            assert client(IMAGES, PROMPTS).isfinite().all()
            assert time.monotonic() < deadline
    assert f"{first.url} answers again" in caplog.text


def test_the_processes_of_a_run_begin_with_different_servers(monkeypatch):
    urls, asked = [f"http://127.0.0.1:{port}" for port in (1, 2, 3, 4)], []
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        pool = Endpoints(urls)
        pool.call(asked.append)
        # The next one goes elsewhere while the first is busy.
        pool.call(lambda url, pool=pool: pool.call(asked.append) or asked.append(url))
    assert {url: asked.count(url) for url in urls} == dict.fromkeys(urls, 6)


def test_a_server_that_stays_away_is_an_error_within_the_patience(monkeypatch):
    server = RewardServer(Mean())
    client = remote(server.url, patience=0.6)
    server.close()
    began, waits = time.perf_counter(), list[float]()
    changed = client.endpoints._changed
    wait = changed.wait
    monkeypatch.setattr(changed, "wait", lambda seconds: waits.append(seconds) or wait(seconds))
    with pytest.raises(RuntimeError, match=r"no answer for 0.6 s \(http://127.0.0.1.*refused"):
        client(IMAGES, PROMPTS)
    assert time.perf_counter() - began < 5
    # It sleeps through the pause after each failure, instead of asking all the time.
    assert waits
    assert max(waits) > 0.1
    assert min(waits) >= 0.01
    with pytest.raises(ConnectionError, match=r"no answer for 0\.1 s"):
        remote(server.url, patience=0.1)


def test_what_is_no_reward_server_is_refused():
    with pytest.raises(ValueError, match=r"'127.0.0.1:8500' is not a URL of the form http://host"):
        remote("127.0.0.1:8500")
    with RewardServer(Mean()) as running, pytest.raises(ValueError, match=r"not a reward server: .*404"):  # fmt: skip
        remote(running.url + "/v1")


def test_redirects_are_not_followed(server):
    class Elsewhere(threading.Thread):
        def run(self) -> None:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.port = listener.getsockname()[1]
                started.set()
                client, _ = listener.accept()
                with client:
                    client.recv(10000)
                    to = f"HTTP/1.1 302 x\r\nLocation: {server.url}/healthz\r\nContent-Length: 0\r\n\r\n"
                    client.sendall(to.encode())

    started = threading.Event()
    thread = Elsewhere()
    thread.start()
    started.wait()
    with pytest.raises(Refused, match="status 302"):
        Endpoints(f"http://127.0.0.1:{thread.port}").request("/healthz")
    thread.join()


class Raw(threading.Thread):
    """Answers one request with these bytes, one piece every 0.1 s."""

    def __init__(self, *pieces: bytes):
        super().__init__()
        self.pieces = pieces
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with self.listener, self.listener.accept()[0] as connection:
            connection.recv(10000)
            for piece in self.pieces:
                try:
                    connection.sendall(piece)
                except OSError:  # the client left
                    return
                time.sleep(0.1)


def test_an_answer_that_drips_or_is_cut_off_or_has_no_end_fails(monkeypatch):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    drip = Raw(head, *[b"x"] * 20)
    with pytest.raises(ConnectionError, match=r"the answer took more than 0\.5 s"):
        Endpoints(drip.url, timeout=0.5, patience=0.0).request("/")
    # Also in its head, which httpx reads with a timeout for each byte.
    heads = Raw(*[bytes([b]) for b in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 40])
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"the answer took more than 0\.5 s"):
        Endpoints(heads.url, timeout=0.5, patience=0.0).request("/")
    assert time.monotonic() - began < 2.5
    cut = Raw(head + b"{}")
    with pytest.raises(ConnectionError, match=r"without sending complete message body"):
        Endpoints(cut.url, patience=0.0).request("/")
    monkeypatch.setattr(client, "LARGEST_ANSWER", 500)
    endless = Raw(head + b"x" * 1000)
    with pytest.raises(Refused, match="an answer of more than 500 bytes"):
        Endpoints(endless.url, patience=0.0).request("/")
    for thread in (drip, heads, cut, endless):
        thread.join()


# Clients that misbehave.
def connect(server: RewardServer) -> socket.socket:
    port = urlsplit(server.url).port
    assert port
    return socket.create_connection(("127.0.0.1", port), timeout=10)


@pytest.mark.parametrize("sent", [b"", b"POST /score HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_stalls_before_its_request_is_disconnected(server, monkeypatch, sent):
    monkeypatch.setattr(serving, "SILENT_SECONDS", 0.2)
    with connect(server) as raw:
        raw.sendall(sent)
        assert raw.recv(100) == b""


def test_a_client_that_stalls_within_its_body_gets_408(server, monkeypatch):
    monkeypatch.setattr(serving, "SILENT_SECONDS", 0.2)
    with connect(server) as raw:
        raw.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        answer = b"".join(iter(lambda: raw.recv(1000), b""))  # the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"97 bytes are missing" in answer


def test_a_client_that_sends_a_byte_now_and_then_is_disconnected(server, monkeypatch):
    def drip(head: bytes) -> bytes:
        with connect(server) as raw:
            raw.sendall(head)
            began = time.monotonic()
            while time.monotonic() - began < 5:
                try:
                    raw.sendall(b"x")
                    raw.settimeout(0.1)
                    if (answer := raw.recv(1000)) is not None:
                        return answer
                except TimeoutError:
                    continue
                except OSError:
                    return b""
        raise AssertionError("the connection is still open")

    monkeypatch.setattr(serving, "BODY_SECONDS", 0.5)
    body = drip(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    assert body.startswith(b"HTTP/1.1 408")
    monkeypatch.setattr(serving, "SILENT_SECONDS", 0.5)
    assert drip(b"POST /score HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""


def test_a_stranger_is_refused_before_a_body_is_sent():
    with RewardServer(Mean(), token="secret") as running, connect(running) as raw:
        head = (
            "POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nExpect: 100-continue\r\n"
        )
        raw.sendall(f"{head}\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 401")


def test_a_connection_is_used_again_and_an_answer_does_not_wait_for_the_network(server):
    endpoints = Endpoints(server.url)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        endpoints.request("/healthz")
        times.append(time.perf_counter() - began)
    assert len(server._server.server_state.connections) == 1
    # Nagle's algorithm with delayed acknowledgements would make it 0.04 s each.
    assert min(times) < 0.03


def test_requests_in_progress_are_answered_when_the_server_stops():
    reward = Mean()
    running = RewardServer(reward, wait=0.0)
    reward.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        pending = pool.submit(remote(running.url), IMAGES, PROMPTS)
        while running.batcher.num_waiting < 8:
            time.sleep(0.01)
        closing = pool.submit(running.close)
        time.sleep(0.3)
        assert not closing.done()
        reward.gate.set()
        closing.result(timeout=20)
        assert pending.result(timeout=20).isfinite().all()


def test_a_reward_that_hangs_does_not_hold_the_server_when_it_stops():
    reward = Mean()
    running = RewardServer(reward, wait=0.0, drain=0.3)
    reward.gate.clear()
    try:
        with ThreadPoolExecutor(1) as pool:
            kind, body = pack(IMAGES, PROMPTS)
            pending = pool.submit(post, running, body, {"Content-Type": kind})
            while running.batcher.num_waiting < len(IMAGES):
                time.sleep(0.01)
            began = time.monotonic()
            assert running.close() is False
            assert time.monotonic() - began < 6
            assert running.batcher._thread.daemon
            # Closed without an answer, or answered with an error.
            with pytest.raises((OSError, ValueError, AssertionError)):
                assert pending.result(timeout=5)[0] == 200
    finally:
        reward.gate.set()


def test_the_token_of_a_server_comes_from_a_file(tmp_path, capsys):
    file = tmp_path / "token"
    for text, message in (
        (None, "--token-file: "),
        ("", "must contain the token and nothing else"),
        ("two words", "must contain the token and nothing else"),
    ):
        if text is not None:
            file.write_text(text)
        assert main(["serve-reward", "jpeg_size", "--token-file", str(file)]) == 2
        assert message in capsys.readouterr().err
    file.write_text("secret\n")
    assert read_token(file) == "secret"
    assert main(["serve-reward", "jpeg_size", "--token", "a", "--token-file", str(file)]) == 2
    assert "not both" in capsys.readouterr().err


# The command, in a process of its own.
def start(port: int, *options: str, token: str = "") -> "subprocess.Popen[str]":
    """``flowgrpo serve-reward`` as soon as it listens."""
    command = [sys.executable, "-m", "flowgrpo", "serve-reward", "jpeg_size", "--port", str(port)]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLOWGRPO_TOKEN": token,
    }  # fmt: skip
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving jpeg_size at http://127.0.0.1:"), line
    return process


def test_a_second_signal_ends_a_server_that_waits_for_a_request():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(port, "--option", "goal=large")
    assert process.stdout is not None
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.5)
            process.terminate()
            assert process.stdout.readline().startswith("stopping after the requests in progress")
            assert process.poll() is None
            process.terminate()
            assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_server_process_is_killed_and_restarted_in_the_middle_of_a_run(monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(port, "--option", "goal=large", "--max-batch", "2", token="t")
    try:
        monkeypatch.setenv("FLOWGRPO_TOKEN", "t")
        options = {"url": f"http://127.0.0.1:{port}", "patience": 600.0, "part": 2}
        scorer = RewardScorer(
            [Reward(model="remote", options=options)], Failures(retries=0, then="stop")
        )
        expected = JPEGSize("large")(IMAGES, PROMPTS)
        assert torch.equal(scorer.submit(IMAGES, PROMPTS).result().reward, expected)
        process.kill()
        process.wait()
        pending = scorer.submit(IMAGES, PROMPTS)
        time.sleep(0.5)
        assert not pending.done()
        process = start(port, "--option", "goal=large", token="t")
        assert torch.equal(pending.result(timeout=300).reward, expected)
        assert "does not answer" in caplog.text
        scorer.close()
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
