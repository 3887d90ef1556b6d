"""The parts of reward servers and their client without HTTP: pauses, deadlines, memory, forms, messages."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpcore
import httpx
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowgrpo.data.pictures import encode_png
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving import client, deadlines, multipart, protocol, server
from flowgrpo.rewards.serving.batching import Batcher, Overloaded
from flowgrpo.rewards.serving.client import Endpoints, Refused, Unavailable
from flowgrpo.rewards.serving.memory import Reserve, Share
from flowgrpo.rewards.serving.multipart import Part, TooManyParts, join, split
from flowgrpo.rewards.serving.protocol import Limits, Sample, WireError

A, B = "http://127.0.0.1:1", "http://127.0.0.1:2"


class Clock:
    """A time that passes only where the client waits for it."""

    def __init__(self) -> None:
        self.now, self.waits = 100.0, list[float]()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(client.time, "monotonic", found)
    monkeypatch.setattr(client.random, "uniform", lambda low, high: low + high - 1)
    return found


def endpoints(clock: Clock, *urls: str, **options: Any) -> Endpoints:
    found = Endpoints(list(urls) or A, **options)

    def wait(seconds: float) -> None:
        clock.waits.append(round(seconds, 6))
        clock.now += seconds

    found._changed.wait = wait  # type: ignore[method-assign, assignment]
    return found


# The client's choice of a server, and its pauses.


def test_pauses_double_up_to_the_longest_and_begin_anew_after_an_answer(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    subject, answers = endpoints(clock, patience=60.0), [False] * 8 + [True, False, True]

    def send(url: str) -> str:
        if not answers.pop(0):
            raise Unavailable("busy")
        return url

    assert subject.call(send) == A
    assert clock.waits == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    clock.waits.clear()
    subject.call(send)
    assert clock.waits == [0.25]
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"{A} does not answer (busy); trying again", f"{A} answers again"] * 2


def test_a_server_says_itself_when_to_come_back(clock: Clock) -> None:
    subject, answers = endpoints(clock), [3.5, 0.0, None]

    def send(url: str) -> str:
        seconds = answers.pop(0)
        if seconds is not None:
            raise Unavailable("later", seconds)
        return "done"

    assert subject.call(send) == "done"
    assert clock.waits == [3.5]


def test_the_other_server_takes_over_while_one_is_paused(clock: Clock) -> None:
    subject, asked = endpoints(clock, A + "/", B), list[str]()
    assert subject.urls == [A, B]

    def send(url: str) -> str:
        asked.append(url)
        if url == A:
            raise Unavailable("down")
        return url

    assert [subject.call(send) for _ in range(3)] == [B] * 3
    assert asked == [A, B, B, B]
    assert clock.waits == []
    # Awake again, it still comes last, having failed.
    clock.now += 60
    subject.call(send)
    assert asked == [A, B, B, B, B]
    # Of servers without a failure the one with fewer requests in progress is taken.
    subject = endpoints(clock, A, B, concurrency=2)
    taken = [subject._take(clock.now) for _ in range(5)]
    assert [t.url if t else None for t in taken] == [A, B, A, B, None]
    assert taken[0] is not None
    subject._give_back(taken[0], None)
    again = subject._take(clock.now)
    assert again is not None
    assert again.url == A


def test_patience_ends_in_an_error_that_names_every_server(clock: Clock) -> None:
    subject = endpoints(clock, A, B, patience=1.0)

    def send(url: str) -> str:
        raise Unavailable(f"no route to {url[-1]}")

    with pytest.raises(ConnectionError, match=rf"no answer for 1 s \({A}: no route to 1; {B}: no route to 2\)"):  # fmt: skip
        subject.call(send)
    # Tried at 0, 0.25 and 0.75; the next pause would end after the patience: no waiting for it.
    assert clock.now == pytest.approx(100.75)
    full = endpoints(clock, concurrency=1, patience=0.0)
    full._take(clock.now)
    with pytest.raises(ConnectionError, match=f"{A}: busy"):
        full.call(send)
    # Waiting for a server that is busy lasts to the deadline.
    clock.waits.clear()
    assert full._take(clock.now + 2.5) is None
    assert clock.waits == [2.5]
    # Other errors end a call at once and are no fault of the server.
    with pytest.raises(KeyError):
        endpoints(clock).call(lambda url: {}[url])  # type: ignore[index]


@pytest.mark.parametrize(
    ("urls", "options", "problem"),
    [
        ([], {}, "at least one URL"),
        ([A, A], {}, "each of them once"),
        (["ftp://host"], {}, "'ftp://host' is not a URL"),
        (["http://"], {}, "'http://' is not a URL"),
        ([A], {"timeout": 0.0}, "timeout must be positive"),
        ([A], {"patience": -0.1}, "patience at least 0"),
        ([A], {"concurrency": 0}, "concurrency at least 1"),
        ([A, "https://host"], {"timeout": 0.1, "patience": 0.0, "concurrency": 1}, ""),
    ],
)
def test_wrong_endpoints_are_refused(urls: list[str], options: dict[str, Any], problem: str) -> None:  # fmt: skip
    if not problem:
        assert Endpoints(urls, **options).urls == urls
        return
    with pytest.raises(ValueError, match=problem):
        Endpoints(urls, **options)


def test_all_are_asked_and_errors_take_the_place_of_answers() -> None:
    def ask(index: int) -> int:
        if index == 1:
            raise KeyError(index)
        return 10 * index

    first, error, third = Endpoints(A).ask_all(3, ask)
    assert (first, third) == (0, 20)
    assert isinstance(error, KeyError)


def test_a_request_is_a_get_or_with_a_body_a_post(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, sent = Endpoints(A, headers={"X-Own": "1"}, patience=0.0), list[Any]()

    def request(method: str, url: str, content: bytes | None, headers: Mapping[str, str]) -> httpx.Response:  # fmt: skip
        sent.append((method, url, content, dict(headers)))
        if content == b"cut":
            raise httpx.ReadError("")
        return httpx.Response(200, content=b"answer", request=httpx.Request(method, url))

    monkeypatch.setattr(subject.clients[A], "request", request)
    assert subject.request("/healthz") == b"answer"
    assert subject.request("/score", "text/plain", b"") == b"answer"
    assert sent == [("GET", f"{A}/healthz", None, {}), ("POST", f"{A}/score", b"", {"Content-Type": "text/plain"})]  # fmt: skip
    with pytest.raises(ConnectionError, match="ReadError"):
        subject.request("/", "", b"cut")


@pytest.mark.parametrize(
    ("status", "content", "outcome"),
    [
        (200, b"ok", b"ok"), (204, b"x", b"x"), (200, b"", Unavailable), (302, b"", Refused), (400, b"", Refused),
        (401, b"", Refused), (404, b"", Refused), (408, b"", Unavailable), (425, b"", Unavailable), (429, b"", Unavailable),
        (422, b"", Refused), (500, b"", Unavailable), (501, b"", Refused), (503, b"", Unavailable), (504, b"", Unavailable),
    ],
)  # fmt: skip
def test_which_answers_are_worth_another_attempt(status: int, content: bytes, outcome: Any) -> None:
    request = httpx.Request("GET", A)
    response = httpx.Response(status, content=content, headers={"Retry-After": "2"}, request=request)  # fmt: skip
    if isinstance(outcome, bytes):
        assert client.checked_answer(response) == outcome
        return
    with pytest.raises(outcome) as caught:
        client.checked_answer(response)
    if outcome is Refused:
        assert caught.value.status == status
        assert f"{A}: status {status}" in str(caught.value)
    else:
        assert caught.value.retry_after == (None if status == 200 else 2)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(" 5 ", 5), ("0.25", 0.25), ("0", 0), ("", None), ("1.2.3", None), ("-1", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None)],
)  # fmt: skip
def test_retry_after(text: str, seconds: float | None) -> None:
    assert client.retry_after({"Retry-After": text}) == seconds
    assert client.retry_after({}) is None


@pytest.mark.parametrize(
    ("url", "uses_proxies"),
    [("http://127.0.0.1:1", False), ("http://127.8.8.8", False), ("http://localhost:1", False), ("http://[::1]:1", False),
     ("http://10.0.0.1", True), ("https://host", True)],
)  # fmt: skip
def test_proxies_are_for_other_machines(url: str, uses_proxies: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    made: list[dict[str, Any]] = []
    real = httpx.Client
    monkeypatch.setattr(client.httpx, "Client", lambda **options: made.append(options) or real(**options))  # fmt: skip
    found = client.make_client(url, {"X-Own": "1"}, 3.0, 5)
    (options,) = made
    assert (options["trust_env"], options["follow_redirects"], options["http2"]) == (uses_proxies, False, False)  # fmt: skip
    assert (found.headers["Accept-Encoding"], found.headers["X-Own"]) == ("identity", "1")
    assert found.timeout == httpx.Timeout(3.0)
    limits = options["limits"]
    assert (limits.max_connections, limits.max_keepalive_connections, limits.keepalive_expiry) == (5, 5, 15.0)  # fmt: skip


# Deadlines.


class Inner(httpcore.NetworkBackend, httpcore.NetworkStream):
    """A network that notes with which time each operation was called, and takes 2 seconds for it."""

    def __init__(self, clock: Clock, fails: bool = False):
        self.clock, self.fails, self.calls = clock, fails, list[Any]()

    def _do(self, *call: Any) -> Any:
        self.calls.append(call)
        self.clock.now += 2
        if self.fails:
            raise httpcore.ReadTimeout("the inner one")
        return self

    def read(self, size: int, timeout: float | None) -> Any:
        self._do("read", size, timeout)
        return b"data"

    def write(self, data: bytes, timeout: float | None) -> None:
        self._do("write", len(data), data[:1], timeout)

    def close(self) -> None:
        self._do("close")

    def get_extra_info(self, info: str) -> Any:
        return self._do(info)

    def start_tls(self, context: Any, name: str | None, timeout: float | None) -> Any:
        return self._do("tls", context, name, timeout)

    def connect_tcp(self, host: str, port: int, timeout: Any, address: Any, options: Any) -> Any:
        return self._do("tcp", host, port, timeout, address, options)

    def connect_unix_socket(self, path: str, timeout: Any, options: Any) -> Any:
        return self._do("unix", path, timeout, options)

    def sleep(self, seconds: float) -> None:
        self._do("sleep", seconds)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A network whose request has some seconds left."""
    time = Clock()
    monkeypatch.setattr(deadlines.time, "monotonic", time)

    def make(seconds: float, fails: bool = False) -> tuple[Inner, Any]:
        inner = Inner(time, fails)
        deadlines._current.ends, deadlines._current.seconds = time.now + seconds, seconds
        return inner, deadlines._Backend(inner)

    yield make
    deadlines._current.ends, deadlines._current.seconds = math.inf, 0.0


def test_every_operation_gets_the_time_that_is_left(limited: Any) -> None:
    inner, backend = limited(20.0)
    stream = backend.connect_tcp("host", 80, 5.0, "address", ["option"])
    stream = stream.start_tls("context", "name", None)
    assert stream.read(10, 30.0) == b"data"
    stream.write(b"a" * deadlines.PIECE + b"b" * deadlines.PIECE + b"c", 30.0)
    stream.close()
    stream.get_extra_info("socket")
    backend.sleep(1.5)
    assert inner.calls == [
        ("tcp", "host", 80, 5.0, "address", ["option"]),
        ("tls", "context", "name", 18.0),
        ("read", 10, 16.0),
        ("write", deadlines.PIECE, b"a", 14.0),
        ("write", deadlines.PIECE, b"b", 12.0),
        ("write", 1, b"c", 10.0),
        ("close",),
        ("socket",),
        ("sleep", 1.5),
    ]
    inner.clock.now += 0.5
    stream.read(10)
    assert inner.calls[-1] == ("read", 10, 1.5)
    with pytest.raises(httpcore.ReadTimeout, match="the answer took more than 20 s"):
        stream.read(10)
    with pytest.raises(httpcore.WriteTimeout, match="the answer took more than 20 s"):
        stream.write(b"late")
    with pytest.raises(httpcore.ConnectTimeout, match="the answer took more than 20 s"):
        backend.connect_tcp("host", 80)
    inner, backend = limited(3.0)
    backend.connect_unix_socket("/path", None, ["option"])
    assert inner.calls == [("unix", "/path", 3.0, ["option"])]


def test_an_operations_own_timeout_stays_its_own(limited: Any) -> None:
    inner, backend = limited(10.0, fails=True)
    with pytest.raises(httpcore.ReadTimeout, match="the inner one"):
        deadlines._Stream(inner).read(1, 1.0)
    _, backend = limited(1.0, fails=True)
    with pytest.raises(httpcore.ConnectTimeout, match="the answer took more than 1 s"):
        backend.connect_tcp("host", 80)


def test_a_deadline_begins_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    time, hooks = Clock(), list[str]()
    monkeypatch.setattr(deadlines.time, "monotonic", time)
    transport = httpx.HTTPTransport()
    found = httpx.Client(
        transport=transport, mounts={"http://a": httpx.MockTransport(lambda r: httpx.Response(200)), "http://b": httpx.HTTPTransport()},
        event_hooks={"request": [lambda r: hooks.append("request")], "response": [lambda r: hooks.append("response")]},
    )  # fmt: skip
    deadlines.limit_requests(found, 7.0)
    for one in (transport, *found._mounts.values()):
        if isinstance(one, httpx.HTTPTransport):
            assert isinstance(one._pool._network_backend, deadlines._Backend)
    try:
        found.get("http://a/")
        assert hooks == ["request", "response"], "other hooks stay"
        assert (deadlines._current.ends, deadlines._current.seconds) == (107.0, 7.0)
    finally:
        deadlines._current.ends, deadlines._current.seconds = math.inf, 0.0


# Memory, batches and forms.


def test_memory_is_shared_by_all_but_a_request_alone_may_take_more() -> None:
    reserve = Reserve(100)
    with Share(reserve) as first:
        first.take(60)
        first.take(70)  # alone
        assert reserve.taken == 130
        with pytest.raises(Overloaded, match="take 130 of 100 bytes, and this one needs 1 more"), Share(reserve) as second:  # fmt: skip
            second.take(1)
        assert reserve.taken == 130
    assert reserve.taken == 0
    with Share(reserve) as first, Share(reserve) as second:
        first.take(60)
        second.take(40)  # just enough
        with pytest.raises(Overloaded):
            first.take(1)
    assert reserve.taken == 0


def mean(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    if any(p.text == "nan" for p in prompts):
        return torch.full((len(prompts),), math.nan)
    return media.flatten(1).mean(1)


def test_a_batcher_counts_and_refuses() -> None:
    batcher = Batcher(mean, max_waiting=3, wait=0.0)
    samples = [Sample(torch.full((3, 2, 2), 0.25 * i), Prompt(str(i))) for i in range(4)]
    assert batcher.submit(samples).result() == [0, 0.25, 0.5, 0.75], "more than may wait, but alone"
    failed = Sample(torch.zeros(3, 1, 1), Prompt("nan"))
    found = batcher.submit([samples[1], failed, samples[2]]).result()
    assert (found[0], math.isnan(found[1]), found[2]) == (0.25, True, 0.5)
    while batcher.num_waiting:
        pass
    assert (batcher.num_calls, batcher.num_scored, batcher.num_failed) == (3, 7, 1)
    assert batcher.close() is True
    with pytest.raises(Overloaded, match="the server is stopping"):
        batcher.submit(samples)
    for wrong in ({"max_batch": 0}, {"wait": -0.1}, {"max_waiting": 0}):
        with pytest.raises(ValueError, match="must be at least 1 and wait at least 0"):
            Batcher(mean, **wrong)  # type: ignore[arg-type]
    Batcher(mean, max_batch=1, wait=0.0, max_waiting=1).close()


def test_as_many_samples_wait_as_may_and_batches_are_as_large_as_may() -> None:
    gate, sizes = threading.Event(), list[int]()

    def slow(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        gate.wait(20)
        sizes.append(len(prompts))
        return media.flatten(1).mean(1)

    batcher = Batcher(slow, max_batch=2, max_waiting=5, wait=0.0)
    sample = Sample(torch.zeros(3, 1, 1), Prompt("a"))
    jobs = [batcher.submit([sample])]
    while not batcher._jobs.empty():
        time.sleep(0.001)  # the first is being scored
    jobs += [batcher.submit([sample] * n) for n in (1, 3)]
    with pytest.raises(Overloaded, match="5 samples are waiting"):
        batcher.submit([sample])
    assert batcher.num_waiting == 5
    assert batcher.close(0.01) is False, "it has not answered in time"
    gate.set()
    assert [len(j.result(20)) for j in jobs] == [1, 1, 3]
    assert batcher.close(20.0) is True
    assert (sizes, batcher.num_waiting) == ([1, 2, 2], 0)


def test_forms_are_split_into_their_fields_in_order() -> None:
    parts = [Part("a", "text/plain", b"1\r\n--x"), Part("image", "image/png", b"\x89PNG"), Part("a", "text/plain", b"")]  # fmt: skip
    kind, body = join(parts)
    assert split(kind, body) == [("a", b"1\r\n--x"), ("image", b"\x89PNG"), ("a", b"")]
    assert body.count(b'filename="image.png"') == 1
    assert split(kind, body, most=3)
    with pytest.raises(TooManyParts, match="more than 2 fields"):
        split(kind, body, most=2)
    head = b"--x\r\nContent-Type: text/plain; name=wrong\r\ncontent-DISPOSITION: form-data; name=right\r\n\r\n1\r\n"  # fmt: skip
    form = "multipart/form-data; boundary=x"
    assert split(form, head + head.replace(b"right", b"\xff") + b"--x--\r\n") == [("right", b"1"), ("\ufffd", b"1")]  # fmt: skip
    # Without a name of its own, a field does not have that of the one before.
    nameless = b"--x\r\nContent-Type: text/plain\r\n\r\n1\r\n--x--\r\n"
    for body, problem in (
        (head + nameless, "has no name"),
        (head, "does not end with its boundary"),
        (b"nonsense", "malformed"),
    ):
        with pytest.raises(ValueError, match=problem):
            split(form, body)
    with pytest.raises(ValueError, match="without a boundary"):
        split("multipart/form-data", head)
    assert multipart.Part("a", "b", b"").content == b""


# Messages.

PNG = encode_png(torch.zeros(3, 2, 5))


def packed(*records: dict[str, Any], images: int = 1) -> tuple[str, bytes]:
    parts = [Part("request", "application/json", json.dumps({"samples": records}).encode())]
    return join(parts + [Part("image", "image/png", PNG)] * images)


def test_limits_are_the_largest_that_is_allowed() -> None:
    three = packed({}, {"frames": 2}, images=3)
    sizes: list[int] = []
    allowed = Limits(num_images=3, num_pixels=10, num_decoded=360)
    found = protocol.unpack(*three, allowed, sizes.append)
    assert [s.media.shape for s in found] == [(3, 2, 5), (2, 3, 2, 5)]
    assert sizes == [12 * 3 * 10]
    for limits, problem in (
        (Limits(num_images=2), "3 images exceed the 2"),
        (Limits(num_pixels=9), "sample 0: an image of 5x2 exceeds 9 pixels"),
        (Limits(num_decoded=359), "take more than 359 bytes"),
    ):
        with pytest.raises(WireError, match=problem) as caught:
            protocol.unpack(*three, limits)
        assert caught.value.status == 413
    # Each image may have a prompt: seven fields, and not eight.
    fields = [Part("image", "image/png", PNG)] * 3 + [Part("prompt", "text/plain", b"a")] * 3
    assert len(protocol.unpack(*join(fields), Limits(num_images=3))) == 3
    with pytest.raises(WireError, match="more than 7 fields"):
        protocol.unpack(*join([*fields, *fields[:2]]), Limits(num_images=3))


@pytest.mark.parametrize(
    ("record", "images", "problem"),
    [
        ({"frames": 0}, 0, "'frames' must be the number of images"),
        ({"frames": True}, 1, "'frames' must be the number of images"),
        ({"frames": 2}, 1, "'frames' must be the number of images that a video consists of; there are 1"),
        ({}, 2, "2 images for samples that need 1"),
        ({"prompt": None}, 1, "prompt and negative must be strings"),
        ({"negative": 1}, 1, "prompt and negative must be strings"),
        ({"metadata": [1]}, 1, "and metadata an object"),
        ({"frames": 1, "negative": "b", "metadata": {"x": 1}}, 1, ""),
    ],
)  # fmt: skip
def test_records(record: dict[str, Any], images: int, problem: str) -> None:
    if not problem:
        (found,) = protocol.unpack(*packed(record, images=images), Limits())
        assert found.prompt == Prompt("", "b", {"x": 1})
        assert found.media.shape == (1, 3, 2, 5)
        return
    with pytest.raises(WireError, match=problem) as caught:
        protocol.unpack(*packed(record, images=images), Limits())
    assert caught.value.status == 400


def test_frames_of_different_sizes_and_fields_of_two_kinds_are_refused() -> None:
    request = Part("request", "application/json", json.dumps({"samples": [{"frames": 2}]}).encode())
    image, other = Part("image", "image/png", PNG), Part("image", "image/png", encode_png(torch.zeros(3, 5, 2)))  # fmt: skip
    with pytest.raises(WireError, match="sample 0: needs at least one frame, and all of one size"):
        protocol.unpack(*join([request, image, other]), Limits())
    prompt = Part("prompt", "text/plain", b"a")
    for fields in ([request, request, image], [request, prompt, image]):
        with pytest.raises(WireError, match="give one field 'request', or fields 'prompt'"):
            protocol.unpack(*join(fields), Limits())
    with pytest.raises(WireError, match="unknown field 'other'"):
        protocol.unpack(*join([prompt, Part("other", "text/plain", b"")]), Limits())
    frames = json.dumps({"samples": [{"frames": []}]}).encode()
    with pytest.raises(WireError, match="at least one frame"):
        protocol.unpack("Application/JSON ; charset=utf-8", frames, Limits())


def test_prompts_to_check_may_count_as_many_images_as_a_request_may_hold() -> None:
    body = protocol.pack_prompts([Prompt("a", images=[Image.new("RGB", (2, 2))] * 2), Prompt("b")])
    first, second = protocol.unpack_prompts(body, Limits(num_images=2))
    assert (len(first.images), len(second.images)) == (2, 0)
    with pytest.raises(WireError, match="up to 1"):
        protocol.unpack_prompts(body, Limits(num_images=1))


def test_answers() -> None:
    body = protocol.pack_scores([0.5, math.nan, math.inf, -2.0])
    assert json.loads(body) == {"scores": [0.5, None, None, -2.0]}
    found = protocol.unpack_scores(body, 4)
    assert [None if math.isnan(v) else v for v in found] == [0.5, None, None, -2.0]
    for wrong in (b"{", b"[]", b'{"scores": 1}', b'{"scores": [true]}', b'{"scores": ["1"]}', b'{"scores": [1, 2]}'):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            protocol.unpack_scores(wrong, 1)
    assert protocol.unpack_problem(protocol.pack_problem("a")) == "a"
    for wrong in (b"{", b"[]", b'{"problem": 1}'):
        with pytest.raises(ValueError, match=r"expected \{'problem'"):
            protocol.unpack_problem(wrong)
    assert protocol.unpack_error(protocol.pack_error("a")) == "a"
    assert protocol.unpack_error(b'{"error": {"message": "b", "type": "c"}}') == "b"
    assert protocol.unpack_error(b'{"error": {"type": "c"}}') == "{'type': 'c'}"
    assert protocol.unpack_error(b" plain " + b"x" * 400) == "plain " + "x" * 293
    assert protocol.unpack_error(b"[1]") == "[1]"


def test_which_addresses_are_of_this_machine() -> None:
    own = ("127.0.0.1", "127.1.2.3", "::1", "localhost")
    other = ("0.0.0.0", "10.0.0.1", "::", "example.org", "")
    assert [h for h in (*own, *other) if server._is_loopback(h)] == list(own)


def test_as_many_prompts_as_images_are_sent() -> None:
    images, prompts = torch.zeros(2, 3, 4, 4), [Prompt("a"), Prompt("b")]
    for media, texts in ((images, prompts[:1]), (images[:1], prompts)):
        with pytest.raises(ValueError, match="zip"):
            protocol.pack(media, texts)


def test_how_a_server_is_set_up() -> None:
    with server.RewardServer(mean, drain=0.25, token="t", limits=Limits(num_connections=7)) as running:  # fmt: skip
        found = running._server.config
        assert (found.timeout_keep_alive, found.timeout_graceful_shutdown) == (60, 1)
        assert found.http.max_connections == 7  # type: ignore[union-attr]
        assert (found.access_log, found.server_header, found.lifespan, found.ws) == (False, False, "off", "none")  # fmt: skip
        assert running.health() == {
            "status": "ok", "reward": "mean", "version": server.__version__, "scored": 0, "failed": 0, "waiting": 0,
            "calls": 0, "limits": vars(Limits(num_connections=7)),
        }  # fmt: skip
        assert running.url.startswith("http://127.0.0.1:")
    assert not running._thread.is_alive()
    assert running.close() is True, "closing twice does nothing more"
    for wrong in ({"drain": -0.1}, {"limits": Limits(num_bytes=0)}):
        with pytest.raises(ValueError, match="must be at least 1 and drain at least 0"):
            server.RewardServer(mean, **wrong)  # type: ignore[arg-type]
    with server.RewardServer(mean, name="own", host="localhost", drain=0.0) as running:
        assert running.health()["reward"] == "own"
