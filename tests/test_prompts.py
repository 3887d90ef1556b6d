"""Prompt files and the order in which prompts are trained on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import flowgrpo
from flowgrpo.config import ConfigError, find
from flowgrpo.core.random import Random
from flowgrpo.data.prompt_sets import PromptError, PromptSet, shared
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.arguments import batches, call_key, own_arguments
from flowgrpo.training.inputs import shared_note


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_txt(tmp_path):
    path = write(tmp_path, "p.txt", "a red circle\n\n  ein blauer Würfel  \n")
    assert list(PromptSet.load(path).prompts) == [
        Prompt("a red circle"),
        Prompt("ein blauer Würfel"),
    ]


def test_jsonl_keeps_what_rewards_need(tmp_path):
    rows = [
        {"prompt": "two stars", "tag": "counting", "include": [{"class": "star", "count": 2}]},
        {"prompt": "a cat", "negative_prompt": "blurry", "metadata": {"tag": "x"}},
        {"prompt": "a line\u2028break", "tag": "unicode"},
    ]
    path = write(
        tmp_path, "p.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    )
    stars, cat, line = PromptSet.load(path).prompts
    assert stars.metadata == {"tag": "counting", "include": [{"class": "star", "count": 2}]}
    assert (stars.negative, cat.negative) == (None, "blurry")
    assert cat.metadata == {"tag": "x"}
    assert line.text == "a line\u2028break"


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_csv_also_as_excel_writes_it(tmp_path, start):
    text = start + 'prompt,tag,negative_prompt\n"a circle, red",colors,\na star,single,blurry\n'
    one, two = PromptSet.load(write(tmp_path, "p.csv", text)).prompts
    assert (one.text, one.negative, one.metadata) == ("a circle, red", None, {"tag": "colors"})
    assert (two.text, two.negative) == ("a star", "blurry")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", "p.txt: no prompts in it"),
        ("p.yaml", "prompt: x", r"unknown ending '.yaml'; known: .txt, .jsonl, .csv"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": \n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", '{"prompt": "x"}\n\n["x"]\n', "p.jsonl, line 3: expected an object"),
        (
            "p.jsonl",
            '{"caption": "x"}\n',
            "line 1: needs a key 'prompt' .* keys there: caption; rename 'caption' to 'prompt'",
        ),
        (
            "p.jsonl",
            '{"prompt": " "}\n',
            "line 1: needs a key 'prompt' with some text; keys there: prompt$",
        ),
        (
            "p.csv",
            "prompt;tag\nx;a\n",
            "keys there: prompt;tag; separate the cells of a CSV file by commas",
        ),
        ("p.jsonl", '{"prompt": "x", "metadata": 3}\n', "'metadata' must be an object, got 3"),
        ("p.csv", "prompt,tag\nx,a\n,b\n", "p.csv, line 3: needs a key 'prompt'"),
        ("p.jsonl", '{"prompt": "x", "call": 3}\n', "'call' must be an object, got 3"),
        (
            "p.jsonl",
            '{"prompt": "x", "call": {"strength": 0.5}}\n',
            "line 1: 'call' cannot hold 'strength', which is the same for all",
        ),
        (
            "p.jsonl",
            '{"prompt": "x", "control_image": "none.png"}\n',
            "line 1: image .*none.png cannot be read",
        ),
        (
            "p.jsonl",
            '{"prompt": "x", "negative_prompt": 3}\n',
            "'negative_prompt' must be text, got 3",
        ),
        (
            "p.jsonl",
            '{"prompt": "x", "height": "tall"}\n',
            "'height' must be a whole number above 0",
        ),
        ("p.csv", "prompt,width\nx,wide\n", "line 2: 'width' must be a whole number, got 'wide'"),
        ("p.jsonl", '{"prompt": "x", "image": 7}\n', "an image must be the name of a file, got 7"),
        ("p.jsonl", '{"prompt": "x", "image": "none.png"}\n', "image .*none.png cannot be read"),
        ("p.jsonl", '{"prompt": "x", "image": "p.jsonl"}\n', "image .*p.jsonl cannot be read"),
        (
            "p.jsonl",
            '{"prompt": "x", "image": "a.png", "images": []}\n',
            "give 'image' or 'images', not both",
        ),
        ("p.csv", "text\nx\n", "p.csv, line 2: needs a key 'prompt' .* keys there: text"),
        (
            "p.csv",
            'prompt,tag\n"a\nb",x\na red cube, a ball,colors\n',
            "p.csv, line 4: 3 cells, but the header has 2; put text with a comma in quotes",
        ),
        ("p.csv", "prompt,tag,tag\nx,a,b\n", "p.csv: the column 'tag' is there twice"),
        ("p.csv", "prompt\n" + "x" * 140_000, "p.csv, line 2: not valid CSV: field larger than"),
        (
            "p.jsonl",
            '{"prompt": "a dog \\ud83d runs"}\n',
            "line 1: 'prompt' has an unpaired surrogate, U.D83D, at character 7",
        ),
        (
            "p.jsonl",
            '{"prompt": "x", "text": "\\udc00"}\n',
            "line 1: 'text' has an unpaired surrog",
        ),
        (
            "p.jsonl",
            '{"prompt": "x", "call": {"height": 64}}\n',
            "line 1: 'call' cannot hold 'height'; give it as a key of its own",
        ),
    ],
)
def test_broken_files_are_refused_with_file_and_line(tmp_path, name, text, message):
    with pytest.raises(PromptError, match=message):
        PromptSet.load(write(tmp_path, name, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\nein Würfel\n".encode("latin-1"), r"p.txt, line 2: not UTF-8 \(byte 0xfc\); save"),
        ("ein Würfel\n".encode("utf-16"), r"p.txt is in UTF-16; save it as UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(PromptError, match=message):
        PromptSet.load(tmp_path / "p.txt")


def test_line_ends_of_other_systems_and_endings_in_capitals(tmp_path):
    (tmp_path / "P.TXT").write_bytes(b"one\r\ntwo\rthree\n")
    assert [p.text for p in PromptSet.load(tmp_path / "P.TXT").prompts] == ["one", "two", "three"]
    (tmp_path / "p.csv").write_bytes(b'prompt,tag\r\n"a\r\nb",x\r\n\r\nc\r\n')
    one, two = PromptSet.load(tmp_path / "p.csv").prompts
    assert (one.text, one.metadata, two.text, two.metadata) == ("a\nb", {"tag": "x"}, "c", {})


def test_prompts_that_both_sets_have(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    rows = [{"prompt": "A red  cube"}, {"prompt": "make it blue", "image": "a.png"}]
    other = [
        {"prompt": "a red cube "},
        {"prompt": "make it blue", "image": "b.png"},
        {"prompt": "x"},
    ]
    train, held_out = (
        PromptSet.load(write(tmp_path, f"{i}.jsonl", "\n".join(map(json.dumps, r))))
        for i, r in enumerate((rows, other))
    )
    assert [p.text for p in shared(train, held_out)] == ["a red cube "]
    (note,) = shared_note(train, held_out)
    assert note.startswith(
        "1 of 3 held-out prompts is a training prompt too, such as 'a red cube '"
    )
    assert shared_note(train, PromptSet([held_out.prompts[2]])) == []


def test_a_missing_file_and_a_missing_balance_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*none.txt"):
        PromptSet.load(tmp_path / "none.txt")
    path = write(tmp_path, "p.jsonl", '{"prompt": "x", "tag": "a"}\n{"prompt": "y"}\n')
    with pytest.raises(PromptError, match=r"balance = 'tag', but prompt 2 \('y'\) has no such"):
        PromptSet.load(path, balance="tag")


def test_further_arguments_of_the_call(tmp_path, pictures):
    rows = [
        {"prompt": "a", "control_image": "a.png", "call": {"guidance_scale": 2.0}, "tag": "x"},
        {"prompt": "b", "control_image": "a.png", "call": {"guidance_scale": 2.0}},
        {"prompt": "c", "control_image": "b.png", "call": {"guidance_scale": 2.0}},
        {"prompt": "d", "control_image": "a.png", "call": {"guidance_scale": 3.0, "clip": [1]}},
        {"prompt": "e"},
    ]
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    a, b, c, d, e = PromptSet.load(path).prompts
    assert a.metadata == {"tag": "x"}
    opened = own_arguments([a, b])
    assert opened.pop("control_image").getpixel((0, 0)) == (255, 0, 0)
    assert opened == {"prompt": ["a", "b"], "guidance_scale": 2.0}
    assert own_arguments([c])["control_image"].getpixel((0, 0)) == (0, 0, 255)
    # Only equal calls are shared.
    assert call_key(a) == call_key(b)
    assert len({call_key(p) for p in (a, c, d, e)}) == 4
    assert [list(rows) for rows in batches([a, b, c, d, e], 8)] == [[0, 1], [2], [3], [4]]


RECORDS = [
    {"prompt": "make it red", "image": "a.png", "height": 32, "width": 16, "tag": "edit"},
    {"prompt": "join them", "images": ["a.png", "b.png"], "num_frames": 9, "tag": "video"},
]


def check_conditions(prompts: list[Prompt]) -> None:
    """What was read is what RECORDS say."""
    edit, video = prompts
    assert (edit.text, edit.size, edit.metadata) == ("make it red", (32, 16, None), {"tag": "edit"})
    assert (video.size, video.metadata) == ((None, None, 9), {"tag": "video"})
    assert [i.getpixel((0, 0)) for i in edit.open_images()] == [(255, 0, 0)]
    assert [i.getpixel((0, 0)) for i in video.open_images()] == [(255, 0, 0), (0, 0, 255)]


@pytest.fixture
def pictures(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")


def test_conditions_in_jsonl(tmp_path, pictures):
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, RECORDS)))
    check_conditions(list(PromptSet.load(path).prompts))


def test_conditions_in_csv(tmp_path, pictures):
    text = "prompt,image,height,width,num_frames\nmake it red,a.png,32,16,\nno image,,,,9\n"
    edit, plain = PromptSet.load(write(tmp_path, "p.csv", text)).prompts
    assert (edit.size, len(edit.images)) == ((32, 16, None), 1)
    assert (plain.size, len(plain.images), plain.metadata) == ((None, None, 9), 0, {})


def test_conditions_in_parquet_by_file_name_and_by_content(tmp_path, pictures):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{k: r.get(k) for r_ in RECORDS for k in r_} for r in RECORDS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    check_conditions(list(PromptSet.load(tmp_path / "p.parquet").prompts))
    content = {"bytes": (tmp_path / "b.png").read_bytes(), "path": None}
    rows = [{"prompt": "x", "image": content}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    (prompt,) = PromptSet.load(tmp_path / "q.parquet").prompts
    assert prompt.open_images()[0].getpixel((0, 0)) == (0, 0, 255)


def test_conditions_in_a_hugging_face_dataset(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["make it red"], "image": [Image.open(tmp_path / "a.png")], "tag": ["edit"]}
    whole = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
    whole.save_to_disk(tmp_path / "set")
    (prompt,) = PromptSet.load(find(f"hf:{tmp_path / 'set'}:test")).prompts
    assert (prompt.text, prompt.metadata) == ("make it red", {"tag": "edit"})
    assert prompt.open_images()[0].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(PromptError, match="no split 'train'; there: test"):
        PromptSet.load(find(f"hf:{tmp_path / 'set'}"))
    with pytest.raises(PromptError, match="the dataset cannot be loaded"):
        PromptSet.load(find(f"hf:{tmp_path / 'nowhere'}"))


def test_an_iteration_has_one_size_and_sizes_take_turns_by_their_share():
    wide = [Prompt(f"wide {i}", width=64) for i in range(6)]
    tall = [Prompt(f"tall {i}", height=64) for i in range(2)]
    prompts = PromptSet([*tall, *wide])
    drawn = [prompts.groups(i, 2, Random(0)) for i in range(16)]
    assert all(len({g.prompt.size for g in groups}) == 1 for groups in drawn)
    counts = Counter(groups[0].prompt.text.split()[0] for groups in drawn)
    assert counts == {"wide": 12, "tall": 4}
    assert Counter(g.prompt.text for groups in drawn for g in groups) == {
        **{f"wide {i}": 4 for i in range(6)},
        **{f"tall {i}": 4 for i in range(2)},
    }


def test_without_a_size_of_their_own_edits_go_by_the_size_of_their_image():
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))
    prompts = [Prompt("a", images=[small]), Prompt("b", images=[large])]
    assert len(PromptSet(prompts, fixed_size=False).buckets) == 2
    assert len(PromptSet(prompts, fixed_size=True).buckets) == 1


def prompt_set(sizes: dict[str, int], balance: str = "tag") -> PromptSet:
    prompts = [Prompt(f"{t} {i}", metadata={"tag": t}) for t, n in sizes.items() for i in range(n)]
    return PromptSet(prompts, balance)


def texts(prompts: PromptSet, iterations: range, number: int, seed: int = 0) -> list[str]:
    groups = [g for i in iterations for g in prompts.groups(i, number, Random(seed))]
    return [g.prompt.text for g in groups]


def test_every_epoch_covers_every_prompt_once_in_a_new_order():
    prompts = prompt_set({"a": 10}, balance="")
    order = texts(prompts, range(6), 5)
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(len(set(e)) == 10 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    # Also when an epoch does not end with an iteration.
    uneven = texts(prompts, range(10), 3)
    assert sorted(uneven[:10]) == sorted(uneven[10:20]) == sorted(epochs[0])


def test_the_order_depends_only_on_seed_and_iteration():
    prompts = prompt_set({"a": 7, "b": 3})
    straight = texts(prompts, range(8), 4)
    assert straight[20:] == texts(prompts, range(5, 8), 4)
    assert straight == texts(prompts, range(8), 4)
    assert straight != texts(prompts, range(8), 4, seed=1)


def test_balance_is_exact_in_every_iteration_and_covers_each_class():
    prompts = prompt_set({"many": 50, "few": 3, "one": 1})
    for iteration in range(4):
        tags = Counter(g.prompt.metadata["tag"] for g in prompts.groups(iteration, 6, Random(0)))
        assert tags == {"many": 2, "few": 2, "one": 2}
    drawn = Counter(texts(prompts, range(25), 6))
    assert all(drawn[f"many {i}"] == 1 for i in range(50))
    assert {drawn[f"few {i}"] for i in range(3)} <= {16, 17}
    odd = Counter(t.split()[0] for t in texts(prompts, range(5), 4))
    assert max(odd.values()) - min(odd.values()) <= 1


def test_weights_draw_classes_in_proportion_and_do_not_change_with_the_start():
    prompts = replace(prompt_set({"a": 4, "b": 2, "c": 3}), weights={"b": 3.0})
    drawn = texts(prompts, range(10), 10)
    assert Counter(t.split()[0] for t in drawn) == {"a": 20, "b": 60, "c": 20}
    # Evenly over time, and every prompt of a class equally often.
    assert all(5 <= sum(t[0] == "b" for t in drawn[i : i + 10]) <= 7 for i in range(0, 100, 10))
    assert Counter(drawn)["b 0"] == Counter(drawn)["b 1"] == 30
    later = replace(prompt_set({"a": 4, "b": 2, "c": 3}), weights={"b": 3.0})
    assert texts(later, range(7, 10), 10) == drawn[70:]
    equal = replace(prompts, weights={"a": 2.0, "b": 2.0, "c": 2.0})
    assert texts(equal, range(4), 5) == texts(prompt_set({"a": 4, "b": 2, "c": 3}), range(4), 5)


def test_weights_that_name_no_class_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "tag": "colors"}\n{"prompt": "y", "tag": "position"}\n')
    with pytest.raises(PromptError, match=r"weights.color: no prompt .* 'color'.* did you mean 'colors'"):  # fmt: skip
        PromptSet.load(path, "tag", weights={"color": 2.0})
    for settings, message in (
        (["prompts.weights={color_attr=0.0}"], "color_attr must be from 1e-6"),
        (["prompts.weights={color_attr=2.0}", "prompts.balance=''"], "needs prompts.balance"),
    ):
        with pytest.raises(ConfigError, match=message):
            flowgrpo.load("quickstart_flow_grpo", settings).check()


def test_groups_are_indexed_and_equal_prompts_are_two_groups():
    groups = prompt_set({"one": 1}).groups(3, 4, Random(0))
    assert [g.index for g in groups] == [0, 1, 2, 3]
    assert len({g.prompt.text for g in groups}) == 1


def test_spread_is_even_over_classes_and_prompts():
    prompts = prompt_set({"a": 4, "b": 2})
    pairs = prompts.spread(12)
    assert Counter(p.metadata["tag"] for p, _ in pairs) == {"a": 6, "b": 6}
    assert [s for p, s in pairs if p.text == "b 0"] == [0, 1, 2]
    assert Counter(p.text for p, s in pairs if s == 0) == Counter(p.text for p in prompts.prompts)
    assert len({(p.text, s) for p, s in pairs}) == 12
    assert prompts.spread(5) == pairs[:5]


def test_all_broken_lines_are_named(tmp_path):
    good, broken = '{"prompt": "a"}\n', 'x\n{"caption": "b"}\n'
    with pytest.raises(PromptError) as error:
        PromptSet.load(write(tmp_path, "p.jsonl", good + broken))
    first, second = str(error.value).split("\n")
    assert "p.jsonl, line 2: not valid JSON" in first
    assert "p.jsonl, line 3: needs a key 'prompt'" in second
    with pytest.raises(PromptError) as error:
        PromptSet.load(write(tmp_path, "p.jsonl", good + broken * 6))
    assert str(error.value).split("\n")[-2:][1] == "and 2 more"
    with pytest.raises(PromptError, match=r"line 2: .*\n.*line 4: "):
        PromptSet.load(write(tmp_path, "p.csv", "prompt,height\na,x\nb,64\nc,0\n"))
