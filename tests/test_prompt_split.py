"""Dividing a prompt file: nothing is lost, equal prompts stay together, classes are held out alike."""

import json
from pathlib import Path

import pytest

from flowgrpo.cli import main
from flowgrpo.data.prompt_files import PromptError, read_prompts
from flowgrpo.data.prompt_split import split_prompts


def jsonl(folder: Path, *records: dict[str, object]) -> Path:
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_the_two_files_have_all_records_and_no_prompt_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": f"prompt {i}", "tag": "ab"[i % 2], "n": i} for i in range(12)]
    records.append({"prompt": "Prompt  3", "tag": "b", "n": 12})  # as prompt 3
    path = jsonl(tmp_path, *records)
    assert main(["split-prompts", str(path), "--held-out", "4", "--balance", "tag"]) == 0
    out = capsys.readouterr().out
    train, held_out = (
        read_prompts(tmp_path / f"all_{side}.jsonl") for side in ("train", "held_out")
    )
    sides = [[p.metadata["n"] for p in some] for some in (train, held_out)]
    assert sorted(sides[0] + sides[1]) == list(range(13))
    assert sides == [sorted(sides[0]), sorted(sides[1])], "in the order of the file"
    assert (3 in sides[0]) == (12 in sides[0])
    distinct = {p.text.casefold().replace("  ", " "): p.metadata["tag"] for p in held_out}
    assert sorted(distinct.values()) == ["a", "a", "b", "b"]
    assert f"all_held_out.jsonl  {len(held_out)} prompts (2 a, " in out

    assert main(["split-prompts", str(path), "--held-out", "4"]) == 1
    assert "all_train.jsonl is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "kept"),
    [
        ("p.txt", "a red cube\n\n  a blue ball  \na cat\n", ["a blue ball", "a cat", "a red cube"]),
        ("p.csv", 'prompt,tag\n"a, b",x\n"two\nlines",y\nplain,\n', ["a, b", "plain", "two\nlines"]),
    ],
)  # fmt: skip
def test_texts_and_cells_stay_as_they_are(name: str, text: str, kept: list[str], tmp_path: Path) -> None:  # fmt: skip
    path = tmp_path / name
    path.write_text(text)
    before = read_prompts(path)
    split = split_prompts(path, 1)
    split.write()
    both = [read_prompts(f) for f in split.files]
    assert [len(b) for b in both] == [2, 1]
    assert sorted(p.text for some in both for p in some) == kept
    tags = {p.text: p.metadata for p in before}
    assert all(p.metadata == tags[p.text] for some in both for p in some)


def test_the_choice_is_of_the_seed_and_what_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"prompt": f"prompt {i}", "tag": str(i % 5)} for i in range(40)))
    first = split_prompts(path, 10).held_out
    assert first == split_prompts(path, 10).held_out != split_prompts(path, 10, seed=1).held_out
    assert split_prompts(path, 35, "tag").counts == {str(i): (1, 7) for i in range(5)}
    with pytest.raises(PromptError, match=r"40 different prompts: from 1 to 35 .* one of each tag"):
        split_prompts(path, 36, "tag")
    with pytest.raises(PromptError, match=r"balance = 'tga', but prompt 1 .* has no such metadata"):
        split_prompts(path, 3, "tga")
    with pytest.raises(PromptError, match=r"only \.txt, \.jsonl and \.csv files"):
        split_prompts(tmp_path / "p.parquet", 3)
