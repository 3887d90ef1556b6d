"""``flowgrpo score``: images and videos in folders, options of rewards, tables."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowgrpo.cli import main
from flowgrpo.cli.common import UsageError
from flowgrpo.cli.score import find_media, named_rewards, read_medium
from flowgrpo.data.prompts import Prompt
from reward_models.jpeg_size import JPEGSize


def draw(path: Path, seed: int, size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, size in enumerate([(16, 12), (8, 8), (16, 12)]):
        draw(tmp_path / "images" / f"{i}.png", i, size)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    return tmp_path / "images"


def test_tables_as_json_lines_and_csv(images, tmp_path):
    base = ["score", str(images), "--prompts", str(tmp_path / "prompts.txt"), "--batch", "2"]
    rewards = ["--reward", "jpeg_size", "--reward-option", "jpeg_size.goal=large"]
    for name in ("t.jsonl", "t.csv"):
        assert main([*base, *rewards, "--out", str(tmp_path / name)]) == 0
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    media = [read_medium(m) for m in find_media(images)]
    sizes = [float(JPEGSize("large")(m[None], [Prompt("")])) for m in media]
    assert [r["jpeg_size"] for r in records] == pytest.approx(sizes)
    assert [(r["file"], r["prompt"]) for r in records] == [
        ("0.png", "one"),
        ("1.png", "two"),
        ("2.png", "three"),
    ]
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["jpeg_size"]) for r in rows] == pytest.approx(sizes)
    assert list(rows[0]) == list(records[0])


def test_failed_scores_are_empty_and_not_zero(images, tmp_path, capsys):
    for i in range(3):
        draw(images / f"{i}.png", i)
    command = ["score", str(images), "--reward", "tests.test_scorer:second_is_nan"]
    for name in ("t.jsonl", "t.csv"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    assert "failed 1 of 3" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [r["second_is_nan"] is None for r in records] == [False, True, False]
    assert (tmp_path / "t.csv").read_text().splitlines()[2] == "1.png,,"


def test_if_nothing_was_scored_the_command_fails(images, capsys):
    assert main(["score", str(images), "--reward", "tests.test_scorer:broken"]) == 1
    assert "failed 3 of 3" in capsys.readouterr().out


def test_videos_are_folders_of_frames_or_named_frames(tmp_path):
    for i in range(3):
        draw(tmp_path / "folders" / "walk" / f"{i:03d}.png", i)
        draw(tmp_path / "folders" / "run" / f"{i:03d}.png", 10 + i)
        draw(tmp_path / "names" / f"00000_0_frame{i:03d}.png", i)
    walk = find_media(tmp_path / "folders", frames=True)[1]
    named = find_media(tmp_path / "names")[0]
    assert (walk.name, named.name) == ("walk", "00000_0.png")
    assert read_medium(walk).shape == (3, 3, 12, 16)
    assert bool((read_medium(walk) == read_medium(named)).all())
    # As 'sample' writes them, the index knows the video by its name.
    index = {"file": "00000_0.png", "prompt": "a walk", "metadata": {}}
    (tmp_path / "names" / "index.jsonl").write_text(json.dumps(index) + "\n")
    out = tmp_path / "t.jsonl"
    command = ["score", str(tmp_path / "names"), "--reward", "flowgrpo.rewards.frames:FrameMean"]
    assert main([*command, "--reward-option", "FrameMean.model=jpeg_size", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    expected = JPEGSize()(read_medium(walk), [Prompt("")] * len(read_medium(walk))).mean()
    assert record["prompt"] == "a walk"
    assert record["FrameMean"] == pytest.approx(float(expected))


def test_options_go_to_their_reward():
    found = named_rewards(["a:x", "b"], ["x.n=3", "b.s=text"])
    assert [r.options for r in found] == [{"n": 3}, {"s": "text"}]
    with pytest.raises(ValueError, match=r"expected NAME.KEY=VALUE .*\(x, b\); did you mean 'x'\?"):
        named_rewards(["a:x", "b"], ["xx.n=3"])
    with pytest.raises(ValueError, match=r"expected KEY=VALUE, got 'b\.s'"):
        named_rewards(["b"], ["b.s"])
    with pytest.raises(UsageError, match=r"has moved; write 'flowgrpo.rewards.frames:FrameMean'"):
        named_rewards(["x=flowgrpo.frames:FrameMean"], [])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--out", "t.txt"], 2, "--out must end in .jsonl or .csv, got 't.txt'"),
        (["--batch", "0"], 2, "--batch must be at least 1"),
        (["--reward-option", "quality=3"], 2, "expected NAME.KEY=VALUE"),
        (["--reward-option", "jpeg_size.quality=0"], 1, "quality in 1..100"),
    ],
)
def test_bad_arguments(images, arguments, status, message, capsys):
    assert main(["score", str(images), "--reward", "jpeg_size", *arguments]) == status
    assert message in capsys.readouterr().err


def test_folders_without_anything_to_score(images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        find_media(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_media(tmp_path / "nowhere")
    draw(images / "video" / "000.png", 0)
    with pytest.raises(ValueError, match=r"has images \(0.png, ...\) and videos \(video, ...\)"):
        find_media(images, frames=True)
    # GenEval's layout, 00000/samples of one prompt in a folder, looks like frames too.
    with pytest.raises(ValueError, match="such as video: with --frames each is a video"):
        find_media(images)


def test_names_are_ordered_as_people_count(tmp_path):
    for name in ("10", "2", "1", "b2", "B10"):
        draw(tmp_path / f"{name}.png", 0)
    names = [m.name for m in find_media(tmp_path)]
    assert names == ["1.png", "2.png", "10.png", "b2.png", "B10.png"]
    draw(tmp_path / "02.jpg", 0)
    with pytest.raises(ValueError, match="have the same name or number, so which comes first"):
        find_media(tmp_path)


def test_an_index_must_fit_its_folder(images, capsys):
    index = images / "index.jsonl"
    entries = [{"file": f"{i}.png", "prompt": "p", "metadata": {}} for i in (0, 1, 2, 2)]
    command = ["score", str(images), "--reward", "jpeg_size"]
    for text, message in [
        ("".join(json.dumps(e) + "\n" for e in entries), "line 4: 2.png is there twice"),
        (json.dumps({"file": "0.png"}), "line 1 is not one of 'flowgrpo sample'"),
        (json.dumps(entries[0] | {"file": "9.png"}), "lists 1 file not found in"),
    ]:
        index.write_text(text)
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_the_table_has_a_row_per_task_with_errors_by_prompt(tmp_path, capsys):
    rows = []
    for i, (prompt, tag) in enumerate([("a", "two"), ("a", "two"), ("b", "two"), ("c", "one")]):
        draw(tmp_path / f"{i}.png", i, (16, 12 + 8 * i))
        rows.append({"file": f"{i}.png", "prompt": prompt, "metadata": {"tag": tag}})
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "t.jsonl"
    assert main(["score", str(tmp_path), "--reward", "jpeg_size", "--out", str(out)]) == 0
    x = np.array([json.loads(line)["jpeg_size"] for line in out.read_text().splitlines()])
    # By hand: samples 0 and 1 have one prompt.
    d = x[:3] - x[:3].mean()
    two = f"{x[:3].mean():.4f} ± {np.hypot(d[0] + d[1], d[2]) / 3:.4f}"
    d = x - x.mean()
    whole = f"{x.mean():.4f} ± {np.sqrt((d[0] + d[1]) ** 2 + d[2] ** 2 + d[3] ** 2) / 4:.4f}"
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in ("tag images jpeg_size", f"one 1 {x[3]:.4f}", f"two 3 {two}", f"all 4 {whole}"):
        assert row in shown
    assert "0.png" not in " ".join(shown)
    assert main(["score", str(tmp_path), "--reward", "jpeg_size", "--by", "tga"]) == 2
    assert "--by tga: the prompts have tag; did you mean 'tag'?" in capsys.readouterr().err
