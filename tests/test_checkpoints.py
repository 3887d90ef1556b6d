"""Checkpoints: complete or not there, and never silently wrong."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

import flowgrpo
import flowgrpo.config
from flowgrpo.core.errors import ConfigError
from flowgrpo.data import files
from flowgrpo.training import sharded_checkpoints
from flowgrpo.training.checkpoints import (
    CheckpointError,
    digest,
    load,
    newest,
    peek,
    prune,
    save,
    set_aside,
    temporary,
    tidy,
    verify,
)
from flowgrpo.training.run_checkpoints import find_checkpoint, is_name

PARTS = {
    "weights": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5]).bfloat16()},
    "optimizer": {"step": torch.tensor(7), "view": torch.arange(12.0).view(3, 4).T},
    "empty": {},
}
STATE = {"iteration": 12, "best": 0.25, "nested": {"list": [1, 2], "none": None}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "000012", PARTS, STATE)
    return tmp_path / "000012"


def test_what_is_loaded_is_what_was_saved(folder):
    parts, state = load(folder)
    assert state == STATE
    assert parts.keys() == PARTS.keys()
    for name, tensors in PARTS.items():
        assert parts[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert parts[name][key].dtype == value.dtype
            assert torch.equal(parts[name][key], value)


def test_nothing_but_safetensors_and_json_and_no_trace_of_the_writing(folder):
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert [p.name for p in folder.parent.iterdir()] == ["000012"]


def test_trained_parameters_can_be_saved(tmp_path):
    save(tmp_path / "1", {"w": {"one": torch.nn.Parameter(torch.ones(4))}}, {})
    parts, _ = load(tmp_path / "1")
    assert parts["w"]["one"].tolist() == [1] * 4
    assert not parts["w"]["one"].requires_grad


def test_an_existing_checkpoint_is_replaced(folder):
    save(folder, {"weights": {"a": torch.zeros(1)}}, {"iteration": 13})
    parts, state = load(folder)
    assert state == {"iteration": 13}
    assert parts.keys() == {"weights"}


@pytest.mark.parametrize("where", [0, 20, -1])
def test_one_flipped_bit_is_found(folder, where):
    file = folder / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged.* delete .*000012"):
        load(folder)


def test_missing_and_cut_files_are_found(folder):
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors is damaged"):
        load(folder)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"optimizer.safetensors is missing; delete .*000012 to"
    ):
        load(folder)
    best = folder.rename(folder.with_name("best"))
    with pytest.raises(
        CheckpointError, match=r"is missing; restore the file, or use another checkp"
    ):
        load(best)
    (best / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"best/state.json is missing; restore the file"):
        load(best)


def test_a_changed_digit_of_the_state_is_found(folder):
    file = folder / "state.json"
    file.write_text(file.read_text().replace('"iteration": 12', '"iteration": 13'))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: its SHA-256 differs"):
        load(folder)


def test_a_part_may_have_any_name(tmp_path):
    parts = {"reward-owner/model %2F": {"w": torch.ones(2)}, "reward-..": {"w": torch.zeros(2)}}
    save(tmp_path / "1", parts, {})
    assert load(tmp_path / "1")[0].keys() == parts.keys()
    assert {p.name for p in tmp_path.iterdir()} == {"1"}


def test_a_full_disk_leaves_the_last_one_and_frees_its_space(folder, monkeypatch):
    def full(operation, path):
        if path.name == "b.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "failpoint", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, {"a": {"x": torch.ones(9)}, "b": {"x": torch.ones(9)}}, {"iteration": 13})
    assert [p.name for p in folder.parent.iterdir()] == ["000012"]
    assert load(folder)[1] == STATE


@pytest.mark.parametrize("text", ["", '{"iteration": 1', "{}", "[]"])
def test_a_broken_state_is_found(folder, text):
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state.json"):
        load(folder)


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"state.json is missing; delete"):
        load(tmp_path / "000001")


def test_newest_and_prune(tmp_path):
    assert newest(tmp_path) is None
    for iteration in (5, 20, 7, 10, 100):
        save(tmp_path / f"{iteration:06d}", {"w": {"x": torch.tensor(iteration)}}, {})
    save(tmp_path / "best", {"w": {"x": torch.tensor(0)}}, {})
    # A process killed while it wrote: under the temporary name, or a folder without its state.
    (tmp_path / ".000200.tmp").mkdir()
    (tmp_path / ".000200.tmp" / "state.json").write_text("{}")
    for name in ("000300", "000019"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").touch()
    assert newest(tmp_path) == tmp_path / "000100"
    prune(tmp_path, keep=2)
    kept = {p.name for p in tmp_path.iterdir()}
    # The newest one, without its state, is for the start of a session to warn of.
    assert kept == {"000020", "000100", "000300", "best"}
    assert newest(tmp_path) == tmp_path / "000100"


def test_a_process_killed_while_it_replaced_a_checkpoint_loses_nothing(tmp_path):
    best, old = tmp_path / "best", tmp_path / ".best.old"
    save(best, {}, {"iteration": 1})
    best.rename(old)  # Killed before the new one took its place: the old one is put back.
    tidy(tmp_path)
    assert load(best)[1] == {"iteration": 1}
    assert not old.exists()
    # Killed before the old one was deleted: the new one stays.
    shutil.rmtree(best)
    save(best, {}, {"iteration": 2})
    shutil.copytree(best, old)
    tidy(tmp_path)
    assert load(best)[1] == {"iteration": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_save_that_fails_leaves_the_last_one(folder):
    with pytest.raises(TypeError):
        save(folder, {"weights": {"a": torch.zeros(1)}}, {"not json": object()})
    assert load(folder)[1] == STATE
    save(folder, {}, {"iteration": 14})
    assert load(folder) == ({}, {"iteration": 14})
    assert "sha256" in json.loads((folder / "state.json").read_text())


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """The order in which a process that is killed, or a power cut, loses nothing."""
    done = []
    monkeypatch.setattr(files, "failpoint", lambda operation, path: done.append((operation, path)))
    folder, temporary, old = (
        tmp_path / "deep" / n for n in ("000001", ".000001.tmp", ".000001.old")
    )
    for replaced in (False, True):
        done.clear()
        save(folder, {"a": {}, "b": {}}, {})
        assert done == [
            ("write", temporary / "a.safetensors"),
            ("sync", temporary / "a.safetensors"),
            ("write", temporary / "b.safetensors"),
            ("sync", temporary / "b.safetensors"),
            ("write", temporary / "state.json"),
            ("sync", temporary / "state.json"),
            ("sync", temporary),
            *([("rename", folder)] if replaced else []),
            ("rename", temporary),
            ("sync", folder.parent),
            *([("delete", old)] if replaced else []),
        ]
    # What a killed process has left under the temporary name is no part of the next one.
    temporary.mkdir()
    (temporary / "c.safetensors").touch()
    save(folder, {"a": {}}, {})
    assert {p.name for p in folder.iterdir()} == {"a.safetensors", "state.json"}
    done.clear()
    save(folder.with_name("000002"), {}, {})
    done.clear()
    prune(folder.parent, keep=1)
    assert done == [("rename", folder), ("delete", temporary)]


def test_a_damaged_checkpoint_replaces_an_earlier_damaged_one(folder):
    earlier = folder.with_name("damaged-000012")
    earlier.mkdir()
    (earlier / "earlier").touch()
    assert set_aside(folder) == earlier
    assert [p.name for p in folder.parent.iterdir()] == ["damaged-000012"]
    assert load(earlier)[1] == STATE
    assert newest(folder.parent) is None


def test_a_state_is_read_without_its_tensors(folder):
    (folder / "weights.safetensors").write_bytes(b"not read")
    assert peek(folder) == STATE
    (folder / "empty.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"empty.safetensors is missing; delete .*000012"):
        peek(folder)


def test_a_checkpoint_of_several_processes_is_complete_or_not_there(tmp_path, monkeypatch):
    """Each process writes its file; the main one makes the folder and its state."""

    def write(to, parts):
        files.save_tensors(to / "shard-1.safetensors", parts["w"])

    monkeypatch.setattr(sharded_checkpoints.shards, "write", write)
    monkeypatch.setattr(
        sharded_checkpoints.shards, "own_files", lambda to: [to / "shard-1.safetensors"]
    )
    place, parts = tmp_path / "000003", {"w": {"a": torch.ones(2)}}
    other, gathers = tmp_path / ".000003.tmp" / "shard-2.safetensors", []

    def gather(own):
        """The second process writes a file in its own call."""
        gathers.append(own)
        if len(gathers) == 2:
            files.save_tensors(other, {"b": torch.zeros(1)})
        both = isinstance(own[0], dict)
        return [*own, {other.name: digest(other)}] if both else [*own, None]

    sharded_checkpoints.save(place, parts, {"iteration": 3}, is_main=True, gather=gather)
    assert peek(place) == {"iteration": 3, "sharded": True}
    verify(place)
    digests = json.loads((place / "state.json").read_text())["sha256"]
    assert digests == {f.name: digest(f) for f in place.glob("*.safetensors")}
    assert sorted(p.name for p in place.iterdir()) == ["shard-1.safetensors", "shard-2.safetensors", "state.json"]  # fmt: skip
    seen = []
    monkeypatch.setattr(sharded_checkpoints.shards, "read", lambda *a: seen.append(a) or parts)
    whole = sharded_checkpoints.load(place, len)
    assert whole == (parts, {"iteration": 3})
    assert seen == [(place, len)]
    (place / "shard-2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-2\.safetensors is damaged"):
        verify(place)

    # An error of any process ends all of them, and what was there stays.
    def fails(own):
        return [*own, (errno.ENOSPC, "no space") if own == [None] and temporary(place).exists() else None]  # fmt: skip

    before = (place / "state.json").read_text()
    with pytest.raises(OSError, match="another process could not write: no space") as caught:
        sharded_checkpoints.save(place, parts, {}, is_main=True, gather=fails)
    assert caught.value.errno == errno.ENOSPC
    assert (place / "state.json").read_text() == before
    assert not temporary(place).exists()

    def full(to, parts):
        raise OSError(errno.ENOSPC, "own disk")

    monkeypatch.setattr(sharded_checkpoints.shards, "write", full)
    temporary(place).mkdir()
    with pytest.raises(OSError, match="own disk"):
        sharded_checkpoints.save(place, parts, {}, is_main=False, gather=lambda own: own)
    assert temporary(place).exists(), "the main process deletes it"


def test_a_whole_checkpoint_is_read_into_a_divided_model(folder):
    places = []
    parts, state = sharded_checkpoints.load(folder, lambda *given: places.append(given))
    assert state == STATE
    assert torch.equal(parts["weights"]["a.weight"], PARTS["weights"]["a.weight"])
    assert parts["empty"] == {}
    assert ("weights", "a.weight", torch.Size([2, 3])) in places


def test_checkpoints_of_a_run_are_found_by_what_they_are_best_at(tmp_path):
    """A run of 9 iterations that kept the last two checkpoints and the best by its own number."""
    flowgrpo.config.save(
        flowgrpo.load("quickstart_flow_grpo", ["evaluation.best=strict"]), tmp_path / "config.toml"
    )
    inside, log = tmp_path / "checkpoints", tmp_path / "evaluations.jsonl"
    for name in ("best", "best:strict", "best:graded", "last", "7"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint yet|no evaluation yet|there: none"):  # fmt: skip
            find_checkpoint(tmp_path, name)
    nan = float("nan")
    numbers = {0: (0.1, 0.9, 0.0, nan), 3: (0.7, 0.5, 0.8, nan), 6: (0.6, 0.3, 0.9, nan), 9: (0.5, 0.1, 0.7, nan)}  # fmt: skip
    rows = [{"iteration": i, "scores": dict(zip(("strict", "graded", "third", "lost"), v, strict=True))} for i, v in numbers.items()]  # fmt: skip
    log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path, "best:third")
    for name, iteration in (("000008", 8), ("000009", 9), ("best", 3)):
        save(inside / name, {}, {"iteration": iteration})
    (inside / "best-unfinished").mkdir()
    found = {
        name: find_checkpoint(tmp_path, name).name
        for name in ("best", "best:strict", "last", "8", "0009", "3", "best:min:graded")
    }
    assert found == {
        "best": "best", "best:strict": "best", "last": "000009", "8": "000008", "0009": "000009", "3": "best",
        "best:min:graded": "000009",
    }  # fmt: skip
    # Without a value, the nearest by iterations; of two as near, the earlier.
    words = (
        r"the best third, 0\.9, was measured after 6 iterations, .* nearest is 8, which was not "
        r"evaluated \(there: 3, 8, 9\)\. .*keep_best = \['third'\]"
    )
    with pytest.raises(FileNotFoundError, match=words):
        find_checkpoint(tmp_path, "best:third")
    save(inside / "best-min%3Athird", {}, {"iteration": 4})
    assert find_checkpoint(tmp_path, "best:min:third").name == "best-min%3Athird"
    with pytest.raises(FileNotFoundError, match=r"nearest is 4, which .* \(there: 3, 4, 8, 9\)"):
        find_checkpoint(tmp_path, "best:third")
    with pytest.raises(
        FileNotFoundError, match=r"the best graded, 0\.9, is that of the model before"
    ):
        find_checkpoint(tmp_path, "best:graded")
    with pytest.raises(FileNotFoundError, match="no evaluation has a value of 'lost'"):
        find_checkpoint(tmp_path, "best:lost")
    with pytest.raises(ConfigError, match="no number 'thirdd'"):
        find_checkpoint(tmp_path, "best:thirdd")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint after 7 iterations \(there: 3, 4, 8, 9\)"):  # fmt: skip
        find_checkpoint(tmp_path, "7")
    # The evaluation that ended a run early is of weights trained before.
    rows[-1] |= {"scores": {**rows[-1]["scores"], "third": 1.0}, "weights_after": 8}
    log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert find_checkpoint(tmp_path, "best:third").name == "000008"
    shutil.rmtree(inside / "best")
    assert [t for t in ("best", "best:", "best:x", "last", "12", "lastt", "-1", "x:best") if is_name(t)] == ["best", "best:x", "last", "12"]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"nearest is 4, which was not"):
        find_checkpoint(tmp_path, "best:strict")
