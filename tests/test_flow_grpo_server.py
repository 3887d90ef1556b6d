"""The client for servers that speak pickle: off by default, and deaf to anything but numbers."""

import collections
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.scorer import Reward, load_reward
from reward_models.flow_grpo_server import FlowGRPOServer, load_numbers

PROMPTS = [Prompt(f"p{i}", metadata={"tag": "counting", "include": [i]}) for i in range(3)]
IMAGES = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 3, 16, 16)

Answer = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts servers as Flow-GRPO has them, which unpickle what they get."""
    running = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply = answer(pickle.loads(body))
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def light(jpeg: bytes) -> float:
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        return float(np.asarray(image).mean() / 255)


def test_pickle_is_refused_unless_it_is_allowed():
    with pytest.raises(ValueError, match=r"can run code here.*'flowgrpo serve-reward'.*allow_pickle = tr"):  # fmt: skip
        FlowGRPOServer("http://127.0.0.1:18085", "geneval")
    options = {"url": "http://127.0.0.1:18085", "protocol": "prompts"}
    with pytest.raises(ValueError, match="speaks pickle"):
        load_reward(Reward(model="flow_grpo_server", options=options))
    load_reward(Reward(model="flow_grpo_server", options={**options, "allow_pickle": True}))


def test_geneval_servers(serve):
    requests = []

    def answer(request: dict[str, Any]) -> bytes:
        requests.append(request)
        scores = [light(j) for j in request["images"]]
        groups = {"counting": np.array([-10.0])}
        return pickle.dumps({"scores": scores, "strict_rewards": [0.0] * len(scores), "g": groups})

    url = serve(answer)
    subject = FlowGRPOServer(url, "geneval", allow_pickle=True, part=2, concurrency=1)
    assert subject(IMAGES, PROMPTS).tolist() == pytest.approx([0.2, 0.4, 0.6], abs=0.01)
    assert requests[0]["meta_datas"][1] == {"tag": "counting", "include": [1], "prompt": "p1"}
    assert requests[0]["only_strict"] is True
    strict = FlowGRPOServer(url, "geneval", allow_pickle=True, key="strict_rewards")
    assert strict(IMAGES, PROMPTS).tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", [list, np.array, lambda v: [np.float32(x) for x in v]])
def test_prompt_servers(serve, form):
    def answer(request: dict[str, Any]) -> bytes:
        return pickle.dumps({"outputs": form([float(p[1:]) for p in request["prompts"]])})

    subject = FlowGRPOServer(serve(answer), "prompts", allow_pickle=True)
    assert subject(IMAGES, PROMPTS).tolist() == [0, 1, 2]


def test_answers_that_do_not_fit(serve):
    for reply, message in (
        ({"outputs": [1.0]}, r"'outputs' has shape \(1,\) for 3 samples"),
        ({"scores": [1.0]}, r"no 'outputs'; it has \['scores'\]"),
        ([1.0], "no 'outputs'; it has list"),
    ):
        subject = FlowGRPOServer(
            serve(lambda _, r=reply: pickle.dumps(r)), "images", allow_pickle=True
        )
        with pytest.raises(RuntimeError, match=message):
            subject(IMAGES, PROMPTS)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_arrive_in_every_form(protocol):
    values = {
        "list": [1, 2.5, None, True, "text", b"bytes"],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big": np.arange(3, dtype=">f8"),
        "scalar": np.float32(0.25),
    }
    found = load_numbers(pickle.dumps(values, protocol=protocol))
    assert found["list"] == values["list"]
    for name in ("array", "fortran", "big"):
        assert np.array_equal(found[name], values[name])
    assert found["scalar"] == 0.25


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any):
        self.what = (call, arguments)

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_answer_cannot_run_code(tmp_path, serve, protocol):
    target = tmp_path / "made"
    for attack in (
        Attack(os.mkdir, str(target)),
        Attack(eval, f"__import__('os').mkdir({str(target)!r})"),
        {"outputs": [Attack(os.mkdir, str(target))] * 3},
        np.array([Attack(os.mkdir, str(target))], dtype=object),
        collections.OrderedDict(a=1),
        torch.zeros(1),
    ):
        data = pickle.dumps(attack, protocol=protocol)
        with pytest.raises(ValueError, match=r"no pickle of plain numbers: it (asks for|holds an)"):
            load_numbers(data)
    assert not target.exists()
    # It would have done so with pickle's own reader.
    pickle.loads(pickle.dumps(Attack(os.mkdir, str(target)), protocol=protocol))
    assert target.exists()


def test_damaged_answers_are_errors():
    for data in (b"", b"garbage", pickle.dumps([1.0] * 100)[:-5]):
        with pytest.raises(ValueError, match="no pickle of plain numbers"):
            load_numbers(data)
