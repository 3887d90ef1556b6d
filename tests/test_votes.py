"""Votes: pairs, page, file, refusals, comparison, and the reward that is fitted to them."""

import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowgrpo.cli.learn_rubrics import _pairs
from flowgrpo.cli.main import main
from flowgrpo.core.win_rates import wilson
from flowgrpo.data.prompts import Prompt
from flowgrpo.data.votes import Ballot, Shown, Vote, VoteBook, read_ballot, read_votes
from flowgrpo.evaluation.comparison_grid import write_grid
from flowgrpo.evaluation.grid_drawing import GridRow
from flowgrpo.evaluation.vote_pairs import (
    from_folder,
    from_grid,
    make_ballot,
    newest_grid,
    pair_up,
)
from flowgrpo.evaluation.vote_server import VoteServer
from flowgrpo.evaluation.vote_statistics import agreement, krippendorff_alpha, win_rates
from flowgrpo.rewards.vote_fit import VotedPairs, fit_votes
from reward_models.vote_head import VoteHead

EVIL = "<img src=x onerror='window.evil = 1'> a \"photo\""


def picture(number: int, side: int = 16) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sampled(folder: Path, prompts: int = 3, samples: int = 2, seed: int = 0) -> Path:
    """A folder as ``flowgrpo sample`` writes it."""
    folder.mkdir(parents=True)
    lines = []
    for p in range(prompts):
        for s in range(samples):
            picture(1000 * seed + 10 * p + s).save(folder / f"{p:05d}_{s}.png")
            lines.append({"file": f"{p:05d}_{s}.png", "prompt": f"{EVIL} {p}", "metadata": {}})
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def ballot_of(tmp_path: Path, **more: Any) -> Ballot:
    one, two = (sampled(tmp_path / n, seed=i, **more) for i, n in enumerate(("one", "two")))
    sources = [from_folder(one, "one"), from_folder(two, "two")]
    return make_ballot(tmp_path / "votes", sources, 0, 0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VoteServer]:
    with VoteServer(ballot_of(tmp_path), 0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: VoteServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    address = path if path.startswith("http") else server.address + path
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
            kind = answer.headers["Content-Type"]
            return answer.status, json.loads(text) if kind == "application/json" else text
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_votes_through_the_page_are_stored_at_once_and_continued(server):
    ballot = server.ballot
    status, state = ask(server, "state?voter=%20Anna%20%20B")
    assert (status, state["voter"], state["done"], state["total"]) == (200, "Anna B", 0, 6)
    assert set(state) == {"voter", "pair", "prompt", "done", "total"}  # no source
    sides = []
    for choice in ("left", "right", "tie", "skip"):
        pair = ballot.pairs[state["pair"]]
        left = ask(server, f"picture/{state['pair']}/left?voter=Anna%20B")[1]
        sides.append("first" if ballot.picture(pair.first).read_bytes() == left else "second")
        status, state = ask(server, "vote", {"voter": "Anna B", "pair": state["pair"], "choice": choice, "seconds": 1.234})  # fmt: skip
        assert status == 200
    other = {"first": "second", "second": "first"}
    expected = [sides[0], other[sides[1]], "tie", "skip"]
    stored = [json.loads(line) for line in (ballot.folder / "votes.jsonl").read_text().splitlines()]
    assert [line["choice"] for line in stored[1:]] == expected
    assert stored[1]["seconds"] == 1.23
    # The pairs are read by learn-rubrics itself.
    rubrics = _pairs(ballot.folder / "pairs.jsonl")
    winners = [getattr(ballot.pairs[i], expected[i]) for i in (0, 1)]
    assert [files[0].name for _, files in rubrics] == [w.file for w in winners]
    assert [p.text for p, _ in rubrics] == [ballot.pairs[i].prompt for i in (0, 1)]
    assert ask(server, "undo", {"voter": "Anna B"})[1]["pair"] == 3
    assert ask(server, "state?voter=Bob")[1]["done"] == 0
    assert [v.choice for v in read_votes(ballot.folder)[1]] == expected[:3]
    status, words = ask(server, "vote", {"voter": "Anna B", "pair": 0, "choice": "left"})
    assert status == 409
    assert "reload the page" in words


def test_only_this_page_on_this_machine_is_answered(server):
    root = server.address.rsplit("/", 2)[0]
    vote = {"voter": "a", "pair": 0, "choice": "left"}
    assert ask(server, f"{root}/state?voter=a")[0] == 404
    assert ask(server, f"{root}/wrong/vote", vote)[0] == 404
    assert ask(server, "state?voter=a", Host="evil.example")[0] == 403
    assert ask(server, "vote", vote, Origin="http://evil.example")[0] == 403
    assert ask(server, "picture/0/left?voter=")[0] == 404
    assert ask(server, "picture/99/left?voter=a")[0] == 404
    for body in ([], {"voter": "a"}, {"voter": "a", "pair": "x", "choice": "left"}):
        assert ask(server, "vote", body)[0] == 400
    assert ask(server, "vote", {"voter": "a" * 5000})[0] == 413
    for name in ("", "a" * 41, "a\u0007"):
        assert ask(server, "vote", {**vote, "voter": name})[0] == 409
    assert ask(server, "vote", {**vote, "choice": "both"})[0] == 409
    assert ask(server, "state?voter=a")[1]["done"] == 0
    status, page = ask(server, "")
    assert status == 200
    assert b"http://" not in page.replace(b"http://127", b"")
    assert b"https://" not in page


def test_sides_are_random_and_a_second_server_is_refused(server):
    lefts = {v: [server.ballot.first_is_left(i, v) for i in range(200)] for v in ("a", "b")}
    assert lefts["a"] != lefts["b"]
    assert 70 < sum(lefts["a"]) < 130
    with pytest.raises(ValueError, match="another 'flowgrpo vote' is open"):
        VoteServer(server.ballot, 0)


def test_pairs_of_grids_folders_and_samples(tmp_path):
    base, tuned = torch.rand(2, 3, 200, 200), torch.rand(2, 3, 200, 200)
    grid = tmp_path / "grids" / "000030.png"
    for notes in ([["0.5", "0.5"], ["0.7", "1"]], [["✗", "✗"], ["✓", "✓"]]):
        write_grid(
            [GridRow(EVIL, [base, tuned], notes)],
            ["a", "b"],
            grid,
            title="t",
            subtitle="s",
            fps=16.0,
        )
        assert newest_grid(tmp_path) == grid
        found = from_grid(grid, "base", "tuned")
        assert (found is None) == (notes[0][0] == "✗")  # a mark would give the side away
        if found:
            pixels = np.asarray(found[1].pictures[1].image, np.float32) / 255
            assert np.abs(pixels - tuned[1].permute(1, 2, 0).numpy()).max() < 0.01
            assert [(p[0], p[2], p[4]) for p in pair_up(found)] == [(EVIL, "base", "tuned")] * 2
    one = from_folder(sampled(tmp_path / "one", samples=6), "one")
    assert len(pair_up([one])) == 3 * 12
    with pytest.raises(ValueError, match="no prompt in common"):
        pair_up([one, found[0] if found else type(one)("x", [])])
    with pytest.raises(ValueError, match="one picture per prompt"):
        pair_up([from_folder(sampled(tmp_path / "single", samples=1), "single")])
    with pytest.raises(ValueError, match="are equal"):
        pair_up([one, one])


def test_votes_of_other_pictures_and_versions_are_refused(tmp_path):
    ballot = ballot_of(tmp_path)
    with pytest.raises(ValueError, match="has no votes yet"):
        read_votes(ballot.folder)
    book = VoteBook(ballot)
    for pair, choice in enumerate(("first", "second", "tie")):
        book.add(Vote(pair, "a", choice), "first")  # type: ignore[arg-type]
    file = ballot.folder / "votes.jsonl"
    whole = file.read_text()
    # A vote that was cut off by an interruption is not counted, and does not spoil the next one.
    file.write_text(whole + '{"pair": 3, "cho')
    book = VoteBook(ballot)
    assert len(book.votes) == 3
    book.repair()
    assert file.read_text() == whole
    assert len(read_votes(file)[1]) == 3
    for text, message in (
        (whole.replace(ballot.digest, "0" * 64), "votes from another folder"),
        (whole.replace('"format": 1', '"format": 2'), "newer version"),
        (whole.replace('"pair": 1', '"pair": 99'), "line 3 is damaged"),
        (whole.replace('"second"', '"third"'), "line 3 is damaged"),
        ("[]\n" + whole, "line 1 is damaged"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_votes(file)
    file.write_text(whole)
    path = ballot.folder / "ballot.json"
    body = path.read_text()
    for text, message in (
        (body.replace('"format": 1', '"format": 2'), "newer version"),
        (body.replace('"seed": 0', '"seed": 1'), "damaged"),
        ("{", "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_votes(ballot.folder)
    path.write_text(body)
    shown = ballot.picture(ballot.pairs[0].first)
    picture(5).save(shown)
    with pytest.raises(ValueError, match="was changed since"):
        read_ballot(ballot.folder)
    shown.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_ballot(ballot.folder)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    ballot = ballot_of(tmp_path)
    one, two, out = (str(tmp_path / n) for n in ("one", "two", "votes"))
    picture(77).save(tmp_path / "two" / "00000_0.png")
    shutil.copytree(one, tmp_path / "absent")
    (tmp_path / "absent" / "index.jsonl").unlink()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--out", out, "--port", port], f"port {port} is taken"),
            ([one, two, "--out", out], "pictures have changed since"),
            ([one, two, "--out", one], "has other files in it"),
            ([one, one, "--out", out], "named twice"),
            ([str(tmp_path / "absent")], "neither a run directory"),
            (["--out", one], "no votes to go on with"),
            (["--out", out, "--pairs", "3"], "--pairs is for new votes"),
            ([one, "--images", "3"], "--images is for run directories"),
            ([one, "--pairs", "0"], "--pairs must be at least 1"),
            ([one, "--port", "70000"], "--port must be between"),
        ):
            assert main(["vote", *arguments, "--no-browser"]) > 0
            assert message in capsys.readouterr().err
    assert ballot.digest == read_ballot(ballot.folder).digest


def test_intervals_and_agreement_equal_published_numbers():
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}  # fmt: skip
    for (hits, number), interval in published.items():
        assert wilson(hits / number, number) == pytest.approx(interval, abs=5e-5)
    # K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section B: alpha = 0.692.
    units = list(zip("aabbdcccedda", "babbbccceddd", strict=True))
    assert krippendorff_alpha(units) == pytest.approx(0.692, abs=5e-4)
    assert np.isnan(krippendorff_alpha([["a", "a"]]))


def test_votes_are_compared(tmp_path, capsys):
    ballot = ballot_of(tmp_path, prompts=10)
    book = VoteBook(ballot)
    for pair in range(20):
        book.add(Vote(pair, "a", "tie" if pair < 2 else "skip" if pair == 2 else "second"), "first")
    book.add(Vote(3, "b", "first"), "first")
    book.add(Vote(4, "b", "second"), "first")
    (rate,) = win_rates(ballot, book.votes)
    # 19 pairs: two ties, one on which the voters differ, 16 wins.
    assert (rate.first, rate.second, rate.pairs, rate.votes, rate.ties) == ("one", "two", 19, 21, 2)
    assert rate.share == pytest.approx(17.5 / 19)
    found = agreement(book.votes)
    assert found is not None
    assert (found.share, found.pairs, found.voters) == (0.5, 2, 2)
    out = tmp_path / "out"
    assert main(["compare", str(ballot.folder), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "votes: two better by" in text
    assert "two wins 92.1 % of 19 pairs against one" in text
    assert "2 voters agree on 50.0 % of their verdicts on 2 common pairs" in text
    row = json.loads((out / "comparison.json").read_text())["pairs"][0]["rows"][0]
    assert row["wins"] == pytest.approx(17.5 / 19)
    for arguments, message in (
        ([str(ballot.folder), "shapes"], "shapes has no votes"),
        ([str(ballot.folder), "--steps", "3"], "remove --steps"),
        ([f"x={ballot.folder}"], "remove the name"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def voted(wins: np.ndarray) -> VotedPairs:
    return VotedPairs(wins, np.ones(len(wins)), [i // 4 for i in range(len(wins))])


def test_the_fit_finds_the_taste_and_no_taste_in_noise():
    random = np.random.default_rng(0)
    first, second = random.normal(3, 5, (2, 200, 30))
    direction = np.zeros(30)
    direction[3] = 1.0
    odds = (first - second) @ direction / 2
    wins = (random.random(200) < 1 / (1 + np.exp(-odds))).astype(float)
    fit = fit_votes(first, second, voted(wins))
    assert fit.low > 0.6
    assert np.argmax(np.abs(fit.weight)) == 3
    assert fit.weight[3] == pytest.approx(0.5, rel=0.5)  # the log odds of one unit
    flipped = fit_votes(second, first, voted(1 - wins))
    assert np.allclose(flipped.weight, fit.weight, atol=1e-3)
    intervals = [fit_votes(first, second, voted(random.integers(0, 2, 200) * 1.0), seed=s) for s in range(2)]  # fmt: skip
    assert all(f.low <= 0.5 for f in intervals)
    with pytest.raises(ValueError, match="at least 20 pairs"):
        fit_votes(first, second, voted(np.full(200, 0.5)))
    with pytest.raises(ValueError, match="not finite"):
        fit_votes(first * np.nan, second, voted(wins))


def test_a_head_is_fitted_to_votes_and_scores_like_the_voter(tmp_path, capsys):
    ballot = ballot_of(tmp_path, prompts=15, samples=3)
    book = VoteBook(ballot)

    def red(shown: Shown) -> float:
        return float(np.asarray(Image.open(ballot.picture(shown)))[..., 0].mean())

    for number, pair in enumerate(ballot.pairs):
        first = red(pair.first) > red(pair.second)
        book.add(Vote(number, "a", "first" if first else "second"), "first")
        book.add(Vote(number, "b", "first" if number % 2 else "second"), "first")
    file = tmp_path / "head.safetensors"
    command = ["learn-reward", str(ballot.folder), "--features", "thumbnail", "--out", str(file)]
    assert main([*command, "--voter", "a"]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    head = VoteHead(str(file))
    reds = torch.zeros(2, 3, 16, 16)
    reds[1, 0] = 1.0
    reds[0, 2] = 1.0
    scores = head(reds, [Prompt("a")] * 2)
    assert scores[1] > scores[0]
    reds[0, 0, 0, 0] = torch.nan
    assert torch.isnan(head(reds, [Prompt("a")] * 2)).tolist() == [True, False]
    # The voter b has no taste.
    other = tmp_path / "other.safetensors"
    noise = [*command[:-1], str(other), "--voter", "b"]
    assert main(noise) == 1
    assert "no better than chance" in capsys.readouterr().err
    assert not other.exists()
    assert main([*noise, "--force"]) == 0
    capsys.readouterr()
    for arguments, message in (
        ([*command, "--voter", "c"], "'c' has no votes"),
        ([*command[:-1], "head.pt"], "must end in .safetensors"),
        ([*command, "--feature-option", "size=3"], "takes no arguments"),
    ):
        assert main(arguments) > 0
        assert message in capsys.readouterr().err


def test_a_head_from_elsewhere_is_refused(tmp_path):
    file = tmp_path / "head.safetensors"
    probe = torch.zeros(192)
    tensors = {"weight": torch.ones(192), "mean": torch.zeros(192), "probe": probe}
    notes = {"kind": "flowgrpo-vote-head", "format": "1", "features": "thumbnail", "options": "{}"}
    for changed, change, message in (
        (tensors, {"format": "2"}, "newer version"),
        (tensors, {"kind": "x"}, "is no head of votes"),
        (tensors, {"features": "os:system"}, "unknown features"),
        (tensors, {"options": "["}, "damaged"),
        (tensors, {}, "other weights"),
        ({**tensors, "weight": torch.ones(3)}, {}, "fitted on 3 features"),
        ({"weight": torch.ones(192)}, {}, "damaged"),
    ):
        save_file(changed, file, {**notes, **change})
        with pytest.raises(ValueError, match=message):
            VoteHead(str(file))
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        VoteHead(str(file))
    with pytest.raises(FileNotFoundError, match="no head"):
        VoteHead(str(tmp_path / "absent"))


def test_the_embedded_features_see_the_pictures(tmp_path):
    from reward_models.shared.frozen_features import FrozenFeatures, probe

    found = FrozenFeatures("embedded")([probe(), picture(0, 64), picture(1, 100)])
    assert found.shape == (3, 128)
    assert found.std(0).min() > 0
