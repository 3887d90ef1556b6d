"""Benchmark images: the same however they were made, never half written, never of two settings."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flowgrpo.bench.base import BenchError, load_benchmark
from flowgrpo.bench.files import Log, checksum, locked, write_atomically
from flowgrpo.bench.generation import SETTINGS, Plan, generate
from flowgrpo.bench.models import Subject, subject
from flowgrpo.bench.pictures import Finder
from flowgrpo.bench.run import Part, generate_folder
from flowgrpo.policy import Sampling
from flowgrpo.policy.settings import Adapter, ModelSource

ROOT = Path(__file__).parents[1]
PROMPTS = 6
SAMPLING = Sampling(num_steps=2, guidance_scale=1.0)


def plan_of(folder: Path, model: Subject | None = None, **changes: object) -> Plan:
    benchmark = load_benchmark("shapes", {"samples": 2})
    entries = Part(limit=PROMPTS).of(benchmark)
    model = model or subject("shapes", sampling=SAMPLING, batch=4)
    return replace(Plan(folder, benchmark, entries, model, batch=4), **changes)


def content(folder: Path) -> dict[str, bytes]:
    images = folder / "images"
    return {str(p.relative_to(images)): p.read_bytes() for p in images.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one process made without a break."""
    folder = tmp_path_factory.mktemp("whole") / "bench"
    generate_folder(plan_of(folder))
    return folder


def test_the_layout_is_genevals(whole: Path) -> None:
    """A reader written from the protocol: numbered folders, one record, samples by number."""
    records = [
        json.loads(line)
        for line in (ROOT / "prompts" / "shapes_held_out.jsonl").read_text().splitlines()
    ]
    folders = sorted(p for p in (whole / "images").iterdir() if p.name.isdigit())
    assert len(folders) == PROMPTS
    for folder in folders:
        assert json.loads((folder / "metadata.jsonl").read_text()) == records[int(folder.name)]
        names = sorted(p.name for p in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png"]
        for name in names:
            assert Image.open(folder / "samples" / name).size == (64, 64)
    assert not list(whole.rglob("*.tmp"))


def test_images_of_a_prompt_differ_and_another_seed_differs(whole: Path, tmp_path: Path) -> None:
    images = {k: v for k, v in content(whole).items() if k.endswith(".png")}
    assert len(set(images.values())) == len(images) == 2 * PROMPTS
    generate_folder(plan_of(tmp_path / "other", seed=1))
    other = content(tmp_path / "other")
    assert all(other[k] != v for k, v in images.items())


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_processes_makes_the_same_pictures(
    whole: Path, tmp_path: Path, num_ranks: int
) -> None:
    for rank in range(num_ranks):
        plan = plan_of(tmp_path, rank=rank, num_ranks=num_ranks)
        generate(plan)
    assert content(tmp_path) == content(whole)


def test_another_batch_size_makes_nearly_the_same_pictures(whole: Path, tmp_path: Path) -> None:
    generate_folder(plan_of(tmp_path, batch=5))
    ours, theirs = content(tmp_path), content(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".png"):
            pair = [Image.open(f / "images" / name).tobytes() for f in (tmp_path, whole)]
            assert max(abs(a - b) for a, b in zip(*pair, strict=True)) <= 1


def test_only_what_is_missing_is_made(whole: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    generate_folder(plan)
    names = [n for n in content(tmp_path) if n.endswith(".png")]
    before = {n: (tmp_path / "images" / n).stat().st_mtime_ns for n in names}
    lost = names[1]
    (tmp_path / "images" / lost).unlink()
    generate_folder(plan)
    assert content(tmp_path) == content(whole)
    after = {n: (tmp_path / "images" / n).stat().st_mtime_ns for n in names}
    assert {n for n in names if before[n] != after[n]} == {lost}


def no_model() -> Subject:
    """A subject that fails if it is loaded."""

    def load() -> object:
        raise AssertionError("the model was loaded")

    model = subject("shapes", sampling=SAMPLING, batch=4)
    return replace(model, load=load)


def test_a_complete_folder_needs_no_model(whole: Path) -> None:
    generate_folder(plan_of(whole, no_model()))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda p: replace(p, seed=3), "seed"),
        (lambda p: replace(p, subject=subject("shapes", sampling=Sampling(num_steps=3, guidance_scale=1.0))), "call.num_inference_steps"),
        (lambda p: replace(p, subject=subject("shapes", sampling=Sampling(num_steps=2))), "call.guidance_scale"),
        (lambda p: replace(p, subject=subject("shapes", sampling=SAMPLING, dtype="bfloat16")), "dtype"),
        (lambda p: replace(p, benchmark=load_benchmark("shapes", {"samples": 3})), "samples"),
    ],
    ids=["seed", "steps", "guidance", "dtype", "samples"],
)  # fmt: skip
def test_other_settings_are_refused_by_name(
    whole: Path, change: Callable[[Plan], Plan], key: str
) -> None:
    with pytest.raises(BenchError, match=rf"made with {key} = .* choose another --out"):
        generate_folder(change(plan_of(whole, no_model())))


def test_damaged_and_foreign_images_are_named(whole: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    generate_folder(plan)
    image = tmp_path / "images" / "00000" / "samples" / "0001.png"
    data = image.read_bytes()
    image.write_bytes(data[:-20])
    with pytest.raises(BenchError, match=r"0001\.png is truncated.*delete it"):
        generate_folder(plan)
    Image.new("RGB", (32, 32)).save(image)
    with pytest.raises(BenchError, match=r"32x32.*64x64|64x64.*32x32"):
        generate_folder(plan)
    image.unlink()
    generate_folder(plan)
    assert image.read_bytes() == data


def test_images_without_their_settings_are_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    image = plan.items()[0][0].path
    image.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(image)
    with pytest.raises(BenchError, match=r"no generation\.json"):
        generate_folder(plan)


def killed(folder: Path, wanted: int, delay: float) -> None:
    """Start making images in another process, and kill it when ``wanted`` files are there."""
    process = multiprocessing.get_context("fork").Process(
        target=generate_folder, args=[plan_of(folder)]
    )
    process.start()
    deadline = time.monotonic() + 60
    while pngs(folder) < wanted and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -9


def pngs(folder: Path) -> int:
    return len(list(folder.rglob("*.png*")))


def test_killed_while_generating_it_resumes_to_the_same(whole: Path, tmp_path: Path) -> None:
    folder, chance, interrupted = tmp_path / "killed", random.Random(0), 0
    for wanted in (1, 3, 5, 7):
        killed(folder, wanted, chance.uniform(0, 0.002))
        made = {n: d for n, d in content(folder).items() if not n.endswith(".tmp")}
        assert made
        assert made.items() <= content(whole).items()
        interrupted += len(made) < len(content(whole))
    assert interrupted >= 2, "the process was too fast to be killed on its way"
    generate_folder(plan_of(folder))
    assert content(folder) == content(whole)


# Files.


def test_a_second_job_is_refused_and_ranks_of_one_job_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path):
        # flock belongs to the open file, so that a second opening is a second job here too.
        monkeypatch.setattr("flowgrpo.bench.files.job", lambda: "other")
        with pytest.raises(BenchError, match="another process"):
            locked(tmp_path).__enter__()
    monkeypatch.setattr("flowgrpo.bench.files.job", lambda: "one torchrun")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with locked(tmp_path), locked(tmp_path):
        pass


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "log.jsonl"
    own = Log(path, {"judge": "x"})
    for i in range(3):
        own.append({"key": i, "text": "ä"})
    own.close()
    return path


def test_a_half_written_line_is_cut_off_and_a_damaged_one_left_out(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = log.read_bytes()
    for end in range(data.rfind(b"\n", 0, -1) + 2, len(data)):
        log.write_bytes(data[:end])
        again = Log(log, {"judge": "x"})
        assert [r["key"] for r in again.records] == [0, 1]
        again.append({"key": 2, "text": "ä"})
        again.close()
        assert log.read_bytes() == data
    log.write_bytes(data.replace(b'"key": 1', b'"key": 7'))
    again = Log(log, {"judge": "x"})
    again.close()
    assert [r["key"] for r in again.records] == [0, 2]
    assert "line 3 is damaged" in caplog.text
    with pytest.raises(BenchError, match="another header"):
        Log(log, {"judge": "y"})
    log.write_bytes(b"{" + data)
    with pytest.raises(BenchError, match="line 1: damaged"):
        Log(log, {"judge": "x"})
    assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})


def test_a_full_disk_is_said_and_loses_nothing(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte, as a full disk."""
    data = log.read_bytes()
    own = Log(log, {"judge": "x"})
    with open("/dev/full", "ab", buffering=0) as full:
        own._file, kept = full, own._file
        with pytest.raises(BenchError, match=r"disk of .* is full: free some space"):
            own.append({"key": 3})
        own._file = kept
    own.append({"key": 3})
    own.close()
    assert log.read_bytes().startswith(data)
    assert [r["key"] for r in Log(log, {"judge": "x"}).records] == [0, 1, 2, 3]

    def refuse(self: Path, data: bytes) -> int:
        with open("/dev/full", "wb", buffering=0) as full:
            return full.write(data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(BenchError, match=r"disk of .* is full"):
        write_atomically(log.with_name("image.png"), b"data")
    assert sorted(p.name for p in log.parent.iterdir()) == ["log.jsonl"]


# Models.


def test_adapters_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert Adapter.parse("x/y:0.5") == Adapter("x/y", 0.5)
    assert Adapter.parse("x/y") == Adapter("x/y")
    assert Adapter.parse(str(tmp_path / "a:2")) == Adapter(str(tmp_path / "a:2"))
    for text in ("x:y", "x:nan", "x:inf"):
        with pytest.raises(ValueError, match="scale"):
            Adapter.parse(text)


def test_adapters_are_a_part_of_the_identity(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    one, half = (
        subject(
            ModelSource(path="shapes", adapters=(Adapter(str(tmp_path / "a.safetensors"), s),)),
            sampling=SAMPLING,
        ).identity()
        for s in (1.0, 0.5)
    )
    assert one != half
    assert one["adapters"][0]["sha256"] == half["adapters"][0]["sha256"]


def test_settings_are_stored(whole: Path) -> None:
    table = json.loads((whole / SETTINGS).read_text())
    assert table["settings"]["call"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert table["settings"]["model"] == "shapes"
    assert len(table["settings"]["sha256"]) == len(table["settings"]["data_sha256"]) == 64
    assert table["sampler"]["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert table["versions"]["torch"]


def test_images_of_others_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    """The official names first, then the usual endings; a folder is no image, and none may be there."""
    for name in ("0.jpg", "1.png", "1.jpg", "deep/2.webp", "cat. 3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "4.png").mkdir()
    finder = Finder(tmp_path)
    asked = {
        "0.png": "0.jpg",
        "1.png": "1.png",
        "deep/2.png": "deep/2.webp",
        "cat. 3.png": "cat. 3.png",
    }
    for name, wanted in asked.items():
        assert finder.find([name]) == tmp_path / wanted
    assert finder.find(["absent.png", "1.jpg"]) == tmp_path / "1.jpg"
    for name in ("4.png", "5.png", "nowhere/6.png"):
        assert finder.find([name]) is None
