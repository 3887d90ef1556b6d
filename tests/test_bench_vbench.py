"""VBench: names of videos, generation, results of the official package, scores by video rewards."""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgrpo.bench.base import BenchError, load_benchmark
from flowgrpo.bench.benchmarks.vbench import DIMENSIONS, VBench
from flowgrpo.bench.generation import Plan
from flowgrpo.bench.models import Subject
from flowgrpo.bench.run import Part, generate_folder, import_results, score_folder
from flowgrpo.bench.videos import encode_mp4
from flowgrpo.data.videos import read_video
from tests.conftest import MakePolicy, sampling_of

PROMPTS = {
    "A 3D model of a 1800s victorian house.": ["overall_consistency", "aesthetic_quality", "imaging_quality"],
    "a bird and a cat": ["multiple_objects"],
    "a person, running": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
}  # fmt: skip


def values(result: Mapping[str, Any]) -> dict[str, float]:
    return {m["name"]: m["value"] for m in result["metrics"]}


@pytest.fixture
def vbench(tmp_path: Path) -> VBench:
    """Records of VBench_full_info.json; the first prompt stands there twice, as two do officially."""
    rows = [{"prompt_en": p, "dimension": d} for p, d in PROMPTS.items()]
    rows.append({"prompt_en": rows[0]["prompt_en"], "dimension": ["appearance_style"]})
    (tmp_path / "info.json").write_text(json.dumps(rows))
    settings = {"data_file": str(tmp_path / "info.json"), "any_data": True, "samples": 2}
    made = load_benchmark("vbench", settings)
    assert isinstance(made, VBench)
    return made


def test_videos_survive_their_file(tmp_path: Path) -> None:
    time, place = torch.linspace(0, 1, 7), torch.linspace(0, 1, 34)
    video = (time[:, None, None, None] * 0.5 + place * 0.5).expand(7, 3, 18, 34)
    (tmp_path / "a.mp4").write_bytes(encode_mp4(video, 16))
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert (back - video).abs().mean() < 0.02
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    for name in ("b.mp4", "absent.mp4"):
        with pytest.raises(ValueError, match="can be read"):
            read_video(tmp_path / name)


def test_videos_are_named_as_the_official_package_reads_them(
    vbench: VBench, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """An independent reader: {prompt}-{index}.mp4 for each prompt, once; then rewards score them."""
    sampling = sampling_of("wan_t2v", num_steps=1)
    subject = Subject("tiny", lambda: {"model": "tiny"}, lambda: make_policy("wan_t2v", sampling=sampling), sampling, "float32")  # fmt: skip
    lines = ["a very long prompt about a house", "a bird", "a runner", "the house again"]
    (tmp_path / "longer.txt").write_text("\n".join(lines))
    longer = replace(vbench, augmented=str(tmp_path / "longer.txt"))
    entries = longer.entries()
    assert [e.prompt.text for e in entries] == lines[:3]
    generate_folder(Plan(tmp_path / "out", longer, entries, subject, batch=2))
    images = tmp_path / "out" / "images"
    found = {re.fullmatch(r"(.*)-([0-4])\.mp4", p.name).groups() for p in images.iterdir()}  # type: ignore[union-attr]
    assert found == {(p, str(i)) for p in PROMPTS for i in range(2)}
    settings = json.loads((tmp_path / "out" / "generation.json").read_text())["settings"]
    assert settings["fps"] == 16
    with pytest.raises(BenchError, match="fps = 16, and this command says 8"):
        generate_folder(Plan(tmp_path / "out", replace(longer, fps=8), entries, subject, batch=2))
    scored = replace(longer, rewards=[f"{__name__}:Length"])
    (images / "a bird and a cat-1.mp4").write_bytes(b"damaged")
    result = score_folder(tmp_path / "out", scored, Part(), "tiny")
    assert result["counts"] | {"judged": 5, "failed": 1} == result["counts"]
    (metric,) = result["metrics"]
    lengths = sum(2 * len(p) for p in PROMPTS) - len("a bird and a cat")
    assert metric["value"] == pytest.approx(lengths / 5, abs=1e-5)
    assert any("longer prompts of" in w for w in result["warnings"])
    images_only = Subject(
        "t", lambda: {}, lambda: make_policy("sd15"), sampling_of("sd15"), "float32"
    )
    with pytest.raises(BenchError, match="makes images, and vbench is about videos"):
        generate_folder(Plan(tmp_path / "sd", vbench, entries[:1], images_only))
    (tmp_path / "longer.txt").write_text("one")
    with pytest.raises(BenchError, match=r"has 1 line, and VBench_full_info\.json 4 records"):
        longer.entries()


class Length:
    """A video reward: the length of the prompt; refuses images."""

    def __call__(self, media: torch.Tensor, prompts: Any) -> torch.Tensor:
        assert media.ndim == 5
        assert media.shape[1] > 1
        return torch.tensor([float(len(p.text)) for p in prompts])


def official_results(seed: int = 0) -> dict[str, Any]:
    """Tables per video as the official package writes them: each dimension with its own keys."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for dimension in DIMENSIONS:
        videos, mean = [], []
        for prompt in PROMPTS:
            for i in range(2):
                value = float(torch.rand(1, generator=random))
                video: dict[str, Any] = {
                    "video_path": f"/videos/{prompt}-{i}.mp4",
                    "video_results": value,
                }
                if dimension == "imaging_quality":
                    video["video_results"] = 100 * value
                elif dimension == "dynamic_degree":
                    video["video_results"] = value > 0.5
                    value = float(value > 0.5)
                elif dimension in ("object_class", "multiple_objects", "scene"):
                    right = round(16 * value)
                    value = right / 16
                    video |= {
                        "video_results": value,
                        "success_frame_count": right,
                        "frame_count": 16,
                    }
                elif dimension in ("spatial_relationship", "appearance_style"):
                    video |= {"frame_results": [value - 0.01, value + 0.01], "cur_sim": 0.0}
                videos.append(video)
                mean.append(value)
        found[dimension] = [sum(mean) / len(mean), videos]
    return found


def expected_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """cal_final_score.py by hand: normalise, weigh, (4 quality + semantic) / 5."""
    lowest = {"subject_consistency": 0.1462, "background_consistency": 0.2615, "temporal_flickering": 0.6293,
              "motion_smoothness": 0.706, "appearance_style": 0.0009}  # fmt: skip
    highest = {"motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855,
               "temporal_style": 0.364, "overall_consistency": 0.364}  # fmt: skip
    normal = {}
    for name, (value, _) in results.items():
        low, high = lowest.get(name, 0.0), highest.get(name, 1.0)
        normal[name] = (value - low) / (high - low)
    quality = ["subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
               "aesthetic_quality", "imaging_quality"]  # fmt: skip
    q = (sum(normal[k] for k in quality) + 0.5 * normal["dynamic_degree"]) / 6.5
    semantic = [k for k in normal if k not in (*quality, "dynamic_degree")]
    s = sum(normal[k] for k in semantic) / 9
    return {
        "quality score": 100 * q,
        "semantic score": 100 * s,
        "total score": 100 * (4 * q + s) / 5,
    }


def test_official_results_give_the_leaderboards_scores(vbench: VBench, tmp_path: Path) -> None:
    results = official_results()
    file = tmp_path / "mine_eval_results.json"
    file.write_text(json.dumps(results))
    result = import_results(tmp_path / "out", vbench, file, "mine")
    found = values(result)
    for name, value in expected_scores(results).items():
        assert found[name] == pytest.approx(value)
    for name, (value, _) in results.items():
        assert found[name] == pytest.approx(100 * value, abs=1e-4)
    assert all(m["low"] <= m["value"] <= m["high"] for m in result["metrics"])
    assert result["model_index"][0]["results"][0]["task"] == {"type": "text-to-video"}
    # The zip file that is submitted to the leaderboard: a file per dimension, and lists of prompts.
    archive = tmp_path / "results.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for name in results:
            made.writestr(f"mine/{name}_eval_results.json", json.dumps({name: results[name]}))
            made.writestr(f"mine/{name}_full_info.json", "[]")
    assert values(import_results(tmp_path / "zip", vbench, archive, "mine")) == found


def test_a_part_of_the_dimensions_has_no_total(
    vbench: VBench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mine_eval_results.json"
    results = {"color": official_results()["color"]}
    results["color"][0] += 0.1
    file.write_text(json.dumps(results))
    found = values(import_results(tmp_path / "out", vbench, file, "mine"))
    assert found["semantic score"] is None
    assert found["color"] == pytest.approx(100 * (results["color"][0] - 0.1), abs=1e-4)
    assert "as the mean over its videos" in caplog.text
    video = {"video_path": "a bird and a cat-0.mp4", "video_results": 1.0}
    for table, problem in [
        ({"colour": [1.0, []]}, "'colour' is no dimension"),
        ({"color": [1.0, [{**video, "video_path": "0001.mp4"}]]}, "not named"),
        ({"color": [1.0, [video, video]]}, "stands there twice"),
        ({"color": [1.0, [{**video, "video_path": "a bird and a cat-2.mp4"}]]}, "--samples"),
        ({"color": 0.5}, "no results of VBench"),
        ([1], "a table of dimensions"),
        ({}, "holds no scores"),
    ]:
        file.write_text(json.dumps(table))
        with pytest.raises(BenchError, match=problem):
            import_results(tmp_path / "x", vbench, file, "mine")


def test_what_cannot_be_judged_here_is_said(vbench: VBench, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"vbench evaluate.*_eval_results\.json"):
        vbench.check_judge()
    with pytest.raises(BenchError, match="none of the published files"):
        replace(vbench, any_data=False).entries()
    (tmp_path / "info.json").write_text('[{"prompt_en": "a/b", "dimension": ["color"]}]')
    with pytest.raises(BenchError, match="record 0: no record of VBench"):
        vbench.entries()
