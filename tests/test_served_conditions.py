"""Condition images on their way to reward servers, and prompts checked by them before a run."""

import base64
import http.client
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_transforms import convert_to_rgb

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.serving.protocol import (
    Limits,
    WireError,
    open_image,
    pack,
    pack_prompts,
    unpack,
    unpack_prompts,
)
from flowgrpo.rewards.serving.server import RewardServer
from flowgrpo.rewards.settings import Reward
from reward_models.edit_verifier import EditVerifier
from reward_models.ocr import OCR
from reward_models.remote import Remote
from tests.stub_vlm import Stub
from tests.test_rubrics import EDITED, verifier_stub

BEFORE = Image.new("RGB", (6, 4), (100, 100, 100))
OTHER = Image.linear_gradient("L").resize((9, 7)).convert("RGB")
MEDIA = (torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


class Changes:
    """The mean change from the first condition image; notes the images that it was given."""

    def __init__(self) -> None:
        self.seen: list[list[Image.Image]] = []

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.seen += [p.open_images() for p in prompts]
        light = [p.open_images()[0].convert("L").resize((1, 1)).getpixel((0, 0)) for p in prompts]
        return media.flatten(1).mean(1) - torch.tensor(light) / 255


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with RewardServer(Changes()) as running:
        yield running


def post(server: RewardServer, path: str, kind: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    connection.request("POST", path, body, {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def form(*fields: tuple[str, bytes]) -> bytes:
    head = '--x\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n'
    return b"".join((head % n).encode() + c + b"\r\n" for n, c in fields) + b"--x--\r\n"


FORM = "multipart/form-data; boundary=x"


def test_condition_images_arrive_as_they_were_and_travel_once(tmp_path: Path) -> None:
    OTHER.save(tmp_path / "other.png")
    several = Prompt("b", images=(BEFORE, tmp_path / "other.png"))
    prompts = [Prompt("a", images=[BEFORE]), several, several, Prompt("none")]
    kind, body = pack(MEDIA, prompts)
    reserved: list[int] = []
    samples = unpack(kind, body, Limits(), reserved.append)
    # Samples become numbers of 4 bytes, condition images stay bytes and are kept once.
    pixels = BEFORE.width * BEFORE.height + OTHER.width * OTHER.height
    assert reserved == [4 * MEDIA.numel() + 3 * pixels]
    assert torch.equal(torch.stack([s.media for s in samples]), MEDIA)
    found = [s.prompt.open_images() for s in samples]
    assert found == [[BEFORE], [BEFORE, OTHER], [BEFORE, OTHER], []]
    assert body.count(b'name="condition"') == 2


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_condition_images_of_other_kinds_travel_as_rgb(mode: str) -> None:
    image = OTHER.convert(mode)
    (sample,) = unpack(*pack(MEDIA[:1], [Prompt("a", images=[image])]), Limits())
    (found,) = sample.prompt.open_images()
    assert found.tobytes() == convert_to_rgb(image).tobytes()


def test_a_remote_reward_sees_them(server: RewardServer) -> None:
    prompts = [Prompt("a", images=[BEFORE]), Prompt("b", images=[OTHER, BEFORE])] * 2
    client = Remote(server.url, timeout=20.0, patience=2.0, part=3)
    reward: Any = server.batcher.reward
    scores = client(MEDIA, prompts)
    assert sorted(map(len, reward.seen)) == [1, 1, 2, 2]
    torch.testing.assert_close(scores, Changes()(MEDIA, prompts))
    videos = MEDIA.view(2, 2, 3, 5, 6)
    torch.testing.assert_close(client(videos, prompts[:2]), Changes()(videos, prompts[:2]))


def test_requests_by_hand(server: RewardServer) -> None:
    as_text = [base64.b64encode(png(i)).decode() for i in (OTHER, BEFORE)]
    sample = {"prompt": "a", "image": as_text[0], "conditions": as_text[1:]}
    body = json.dumps({"samples": [sample]}).encode()
    light = Changes()(torch.from_numpy(_array(OTHER))[None], [Prompt("a", images=[BEFORE])])
    expected = {"scores": pytest.approx(light.tolist())}
    assert post(server, "/score", "application/json", body) == (200, expected)
    fields = [("prompt", b"a"), ("image", png(OTHER)), ("condition", png(BEFORE))]
    assert post(server, "/score", FORM, form(*fields)) == (200, expected)


def _array(image: Image.Image) -> Any:
    import numpy as np

    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


def requests() -> list[tuple[str, bytes, int, str]]:
    image, text = png(BEFORE), base64.b64encode(png(BEFORE)).decode()

    def named(places: Any) -> bytes:
        return json.dumps({"samples": [{"prompt": "a", "conditions": places}]}).encode()

    def sample(conditions: Any) -> bytes:
        return json.dumps({"samples": [{"image": text, "conditions": conditions}]}).encode()

    one = [("image", image), ("condition", image)]
    deep = io.BytesIO()
    Image.new("I;16", (3, 3), 40000).save(deep, "PNG")
    deep_text = base64.b64encode(deep.getvalue()).decode()
    return [
        (FORM, form(("request", named([1])), *one), 400, "places among 1 images"),
        (FORM, form(("request", named([-1])), *one), 400, "places among 1 images"),
        (FORM, form(("request", named(0)), *one), 400, "places among 1 images"),
        (FORM, form(("request", named([])), *one), 400, "belongs to no sample"),
        (FORM, form(("prompt", b"a"), ("prompt", b"b"), ("image", image), *one), 400, "no sample"),
        ("application/json", sample(text), 400, "'conditions' lists"),
        ("application/json", sample([1]), 400, "must be base64 strings"),
        ("application/json", sample(["%"]), 400, "no base64"),
        ("application/json", sample(["\u00e9"]), 400, "no base64"),
        ("application/json", sample(["AAAA"]), 400, "sample 0: no readable image"),
        ("application/json", sample([deep_text]), 400, "'I;16' has more than 8 bits"),
    ]


@pytest.mark.parametrize(("kind", "body", "status", "message"), requests())
def test_malformed_condition_images(
    server: RewardServer, kind: str, body: bytes, status: int, message: str
) -> None:
    found, answer = post(server, "/score", kind, body)
    assert found == status, answer
    assert re.search(message, answer["error"]), answer


def test_limits_hold_for_condition_images() -> None:
    prompts = [Prompt("a", images=[BEFORE, BEFORE])]
    kind, body = pack(MEDIA[:1], prompts)
    with pytest.raises(WireError, match="3 images exceed the 2") as caught:
        unpack(kind, body, Limits(num_images=2))
    assert caught.value.status == 413
    large = pack(MEDIA[:1], [Prompt("a", images=[OTHER])])
    with pytest.raises(WireError, match="sample 0: an image of 9x7 exceeds 62 pixels") as caught:
        unpack(*large, Limits(num_pixels=62))
    assert caught.value.status == 413
    assert unpack(*large, Limits(num_pixels=63))


def test_pictures_of_16_bits_are_refused_and_photographs_turned_upright(tmp_path: Path) -> None:
    Image.new("I;16", (3, 3), 40000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        Prompt("a", images=[tmp_path / "deep.png"]).open_images()
    turned = Image.Exif()
    turned[274] = 6  # lies on its side
    OTHER.save(tmp_path / "photo.png", exif=turned)
    upright = OTHER.transpose(Image.Transpose.ROTATE_270)
    (opened,) = Prompt("a", images=[tmp_path / "photo.png"]).open_images()
    for found in (opened, open_image((tmp_path / "photo.png").read_bytes())):
        assert (found.size, found.tobytes()) == (upright.size, upright.tobytes())


# A served verifier of edits.
def test_a_served_edit_verifier() -> None:
    prompt = Prompt("Make the sky red", images=[BEFORE])
    with Stub(verifier_stub) as stub:
        local = EditVerifier("tiny", stub.url)(EDITED, [prompt] * 2)
        with RewardServer(EditVerifier("tiny", stub.url)) as running:
            options = {"url": running.url, "timeout": 20.0, "patience": 2.0}
            scorer = RewardScorer([Reward(model="remote", name="edits", options=options)])
            scorer.check_prompts([prompt])
            with pytest.raises(ValueError, match="'edits': prompt 'no picture' has no condition"):
                scorer.check_prompts([prompt, Prompt("no picture")])
            scores = scorer.score(EDITED, [prompt] * 2).reward
            scorer.close()
    assert local.tolist() == pytest.approx([0.75, 0.25])
    assert torch.equal(scores, local)
    pairs = [q.pictures for q in stub.questions if len(q.pictures) == 2]
    assert all(torch.allclose(before, torch.tensor(100 / 255)) for before, _ in pairs)


# Prompts, before the long work.
def test_prompts_are_checked_by_the_reward_that_is_served(server: RewardServer) -> None:
    quoted = [Prompt(f'a sign that says "{i}"') for i in range(2100)]
    with RewardServer(OCR(reader=lambda image: [])) as running:
        client = Remote(running.url, timeout=20.0, patience=2.0)
        client.check(quoted)
        with pytest.raises(ValueError, match="'a cat'"):
            client.check([*quoted, Prompt("a cat")])
    Remote(server.url, timeout=20.0, patience=2.0).check([Prompt("a reward that checks nothing")])


def test_what_is_checked() -> None:
    prompts = [Prompt("a", "b", {"x": [1]}), Prompt("c", images=[OTHER, BEFORE])]
    found = unpack_prompts(pack_prompts(prompts), Limits())
    assert found[0] == prompts[0]
    assert [i.size for i in found[1].open_images()] == [(1, 1)] * 2
    for conditions in (-1, True, "2", math.pi, 1025):
        body = json.dumps({"samples": [{"prompt": "a", "conditions": conditions}]}).encode()
        with pytest.raises(WireError, match="sample 0: conditions must be a number up to 1024"):
            unpack_prompts(body, Limits())


def test_frames_of_videos_have_the_check_of_their_reward() -> None:
    from flowgrpo.rewards.frames import FrameScore

    FrameScore("ocr").check([Prompt('it says "yes"')])
    with pytest.raises(ValueError, match="'a cat'"):
        FrameScore("ocr").check([Prompt("a cat")])
    FrameScore("jpeg_size").check([Prompt("a cat")])
