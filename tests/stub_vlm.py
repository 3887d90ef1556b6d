"""A real HTTP server that speaks as OpenAI-compatible servers do, and answers as a test wants."""

import base64
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from flowgrpo.rewards.serving.protocol import decode_image

Reply = tuple[int, dict[str, str], bytes]


def said(text: str, first: Mapping[str, float] | None = None) -> Reply:
    """A well-formed answer, with probabilities of the first token."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
    if first is not None:
        top = [{"token": t, "logprob": math.log(p)} for t, p in first.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": top}]}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


class Question:
    """What a client asked: the request, its texts joined and its pictures decoded."""

    def __init__(self, body: bytes, headers: Mapping[str, str]):
        self.request = json.loads(body)
        self.headers = {k.title(): v for k, v in headers.items()}
        parts = next(m["content"] for m in self.request["messages"] if m["role"] == "user")
        self.parts = [p["type"] for p in parts]
        self.text = "\n".join(p["text"] for p in parts if p["type"] == "text")
        urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
        assert all(u.startswith("data:image/") for u in urls)
        self.pictures: list[Tensor] = [
            decode_image(base64.b64decode(u.split(",", 1)[1])) for u in urls
        ]

    @property
    def light(self) -> float:
        """Mean brightness of all pictures."""
        return float(torch.stack([p.mean() for p in self.pictures]).mean())


class Stub:
    """Answers by a function of the question. Use as a context manager.

    Attributes:
        questions: All so far.
        most_at_once: Most that were under way at the same time.
    """

    def __init__(self, answer: Callable[[Question], Reply], port: int = 0, seconds: float = 0.0):
        self.answer, self.seconds = answer, seconds
        self.questions: list[Question] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def _reply(self, body: bytes, headers: Mapping[str, str]) -> Reply:
        question = Question(body, headers)
        with self._lock:
            self.questions.append(question)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.seconds)
        try:
            return self.answer(question)
        finally:
            with self._lock:
                self._now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = self.headers.get("Authorization") != "Bearer wrong"
                body = {"data": [{"id": "tiny"}, {"id": "other"}]}
                self._send(200 if listed else 401, {}, json.dumps(body).encode())

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._send(*stub._reply(body, self.headers))

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                try:
                    self.send_response(status)
                    for key, value in {**headers, "Content-Length": str(len(body))}.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client waited no longer

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> "Stub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def moody(question: Question) -> Reply:
    """By the number in a prompt: well, slowly, with an error once and then well, or garbage."""
    mood = question.text.split("prompt ")[1][0]
    if mood == "1":
        time.sleep(0.5)
    if mood == "2" and not _failed:
        _failed.append(True)
        return 503, {}, b"loading"
    if mood == "3":
        return 200, {}, b"<html>"
    return said("Yes", {"Yes": question.light, "No": 1 - question.light})


_failed: list[bool] = []

if __name__ == "__main__":
    with Stub(moody) as server:
        print(server.url, flush=True)
        threading.Event().wait()
