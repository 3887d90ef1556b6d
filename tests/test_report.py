"""The report of a run: its verdict, its warnings, and that it is a valid page without dependencies."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from flowgrpo.evaluation import curves
from flowgrpo.evaluation.records import Change, Records, standard_error
from flowgrpo.evaluation.report import write_report
from flowgrpo.evaluation.warnings import warnings

CONFIG = """
[model]
path = "shapes"
[algorithm]
kind = "flow_grpo"
group_size = 16
[loss]
clip_range = 1e-4
[train]
iterations = 40
[[rewards]]
model = "shapes_graded"
name = "graded"
[[rewards]]
model = "some.where:strict"
weight = 0.0
"""
VOID = {"meta", "link", "img", "br"}


def metric(iteration, **values):
    healthy = {
        "reward": 0.4 + 0.005 * iteration + 0.02 * math.sin(iteration),
        "reward_std": 0.2,
        "score/graded": 0.5,
        "group/zero_variance": 0.1,
        "group/diversity": 0.2,
        "group/duplicates": 0.0,
        "log_prob/noise": 2e-7,
        "skipped_updates": 0.0,
        "failures": 0.0,
        "grad_norm": 0.3 + 0.01 * (iteration % 7),
        "step/1/clip_fraction": 0.1,
        "step/2/clip_fraction": 0.2,
    }
    return {"iteration": iteration, **healthy, **values}


def evaluation(iteration, images=400, metrics=None, **scores):
    classes = {
        "counting": {**scores, "images": images // 2},
        "colors": {**scores, "images": images // 2},
    }
    return {
        "iteration": iteration,
        "images": images,
        "scores": scores,
        "by_class": classes,
        "metrics": metrics or {},
        "seconds": 3.0,
    }


def run(folder, *, metrics=(), evaluations=(), timings=(), config=CONFIG, environment=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in [("metrics", metrics), ("evaluations", evaluations), ("timings", timings)]:
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if config:
        (folder / "config.toml").write_text(config)
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def report(folder):
    return write_report(folder).read_text("utf-8")


def without_script(page):
    """The page without its own script, the only one that its policy lets run."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in page
    return page.replace(f"<script>{script}</script>", "")


def text_of(page):
    """The text of the page's body, with plain spaces."""
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).replace("\N{NO-BREAK SPACE}", " ").split())


def verdict(folder):
    page = report(folder)
    return text_of(page[page.index('class="card verdict"') : page.index("</section>")])


class Checker(HTMLParser):
    """Checks that tags are opened and closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset", "action") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def full(tmp_path):
    folder = run(
        tmp_path / "a run",
        metrics=[metric(i) for i in range(40)],
        evaluations=[
            evaluation(0, graded=0.5, strict=0.2, aesthetic=5.1, metrics={"diversity/color": 0.9}),
            evaluation(20, graded=0.6, strict=0.2, aesthetic=5.2, metrics={"diversity/color": 0.9}),
            evaluation(
                40, graded=0.7, strict=0.2, aesthetic=5.3, metrics={"diversity/color": 0.88}
            ),
        ],
        timings=[
            {"iteration": i, "rollout": 1.0, "scoring": 0.3, "train": 0.5, "total": 1.6}
            for i in range(40)
        ],
        environment={"torch": "2.15.0", "device": "cpu", "processes": 1},
    )
    (folder / "grids").mkdir()
    for iteration, color in [(0, "red"), (40, "green")]:
        Image.new("RGB", (40, 20), color).save(folder / "grids" / f"{iteration:06d}.png")
    return folder


def test_page_is_well_formed_and_has_no_external_resources(full):
    page = without_script(report(full))
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert {"svg", "img", "table", "details"} <= set(checker.seen)
    assert "script" not in checker.seen
    assert all(link.startswith("data:") for link in checker.links)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_report_holds_every_part(full):
    text = text_of(report(full))
    for part in (
        "a run", "40 of 40 iterations", "on cpu", "trained on", "not trained on", "By task", "counting",
        "Held-out scores in points", "Reward on training samples", "Diversity: color",
        "groups without variance", "Constant throughout", "Clip fraction by step", "rollout", "train",
        "reward models, in parallel with the rollout", "clip_range = 1e-4", "2.15.0",
    ):  # fmt: skip
        assert part in text, part
    assert f"flowgrpo train '{full}/config.toml'" in text.replace("&#x27;", "'")


def test_other_ways_to_sample_are_in_the_verdict_and_have_tables(tmp_path):
    def line(iteration, plain, guided):
        table = evaluation(iteration, images=100, graded=guided)
        del table["iteration"]
        return evaluation(iteration, graded=plain) | {"regimes": {"steps_28_guidance_3": table}}

    folder = run(
        tmp_path, evaluations=[line(0, 0.5, 0.7), evaluation(20, graded=0.6), line(40, 0.7, 0.71)]
    )
    said = verdict(folder)
    assert "graded rose from 50.0 to 70.0 points" in said
    assert "Sampled with steps 28 guidance 3 : graded stayed within noise" in said
    assert "70.0 to 71.0 points (+1.0 ± 6.4)" in said
    text = text_of(report(folder))
    assert text.index("By task") < text.index("Other ways to sample") < text.index("Curves")
    assert "steps 28 guidance 3, 100 images" in text
    assert Records(folder).regime("steps_28_guidance_3").evaluations[1]["iteration"] == 40
    # Without the base model there is nothing to compare with.
    late = run(
        tmp_path / "late",
        evaluations=[evaluation(0, graded=0.5), line(20, 0.6, 0.7), line(40, 0.7, 0.7)],
    )
    assert Records(late).regimes() == []
    assert "Other ways to sample" not in report(late)


def test_only_the_newest_grid_is_embedded(full):
    page = report(full)
    assert page.count("data:image/png;base64,") == 1
    assert 'alt="Comparison grid 000040"' in page


@pytest.mark.parametrize(
    ("after", "words", "headline"),
    [
        (0.70, "graded rose from 50.0 to 70.0 points (+20.0 ± 3.4)", "graded rose."),
        (0.30, "graded fell from 50.0 to 30.0 points (−20.0 ± 3.4)", "graded fell."),
        (0.55, "graded stayed within noise : 50.0 to 55.0 points (+5.0 ± 3.5)", "beyond noise"),
    ],
)
def test_verdict_says_rose_fell_or_noise(tmp_path, after, words, headline):
    said = verdict(
        run(tmp_path, evaluations=[evaluation(0, graded=0.5), evaluation(9, graded=after)])
    )
    assert words.replace(" :", ":") in said.replace(" :", ":")
    assert headline in said
    assert "After 9 iterations" in said
    count = {"rose": after > 0.6, "fell": after < 0.4, "stayed within noise": 0.4 < after < 0.6}
    assert all(f"{word} in {2 if is_so else 0}" in said for word, is_so in count.items())


def test_verdict_on_scores_that_disagree_names_each(tmp_path):
    ends = [evaluation(0, a=0.5, b=0.5), evaluation(9, a=0.7, b=0.3)]
    assert "mixed: a rose, b fell." in verdict(run(tmp_path, evaluations=ends))


def test_score_without_known_error_is_not_called_a_success(tmp_path):
    ends = [evaluation(0, aesthetic=5.10), evaluation(9, aesthetic=5.12)]
    said = verdict(run(tmp_path, evaluations=ends))
    assert "rose; whether by more than noise is unknown" in said
    assert "5.100 to 5.120 (+0.020)" in said
    assert 'class="tile unknown"' in report(tmp_path)
    # A score in [0, 1] has the error of a proportion only if the number of images is known.
    ends = [evaluation(0, graded=0.5), evaluation(9, graded=0.7)]
    for line in ends:
        del line["images"]
    assert "whether by more than noise is unknown" in verdict(run(tmp_path / "b", evaluations=ends))


def test_recorded_errors_are_used(tmp_path):
    ends = [evaluation(0, aesthetic=5.0), evaluation(9, aesthetic=5.5)]
    for line in ends:
        line["errors"] = {"aesthetic": 0.03}
    said = verdict(run(tmp_path, evaluations=ends))
    assert "aesthetic rose from 5.00 to 5.50 (+0.50 ± 0.04)" in said
    assert "upper limit" not in said


def test_verdict_warns_of_evaluations_of_different_size(tmp_path):
    ends = [evaluation(0, graded=0.5), evaluation(9, images=100, graded=0.5)]
    assert "first evaluation has 400 images and the last 100" in verdict(
        run(tmp_path, evaluations=ends)
    )


def test_a_nan_score_is_reported_as_unmeasured(tmp_path):
    ends = [evaluation(0, graded=0.5), evaluation(9, graded=math.nan)]
    assert "graded could not be measured" in verdict(run(tmp_path, evaluations=ends))


def test_one_evaluation_or_none_makes_no_claim(tmp_path):
    once = verdict(run(tmp_path / "once", evaluations=[evaluation(0, graded=0.5)]))
    assert "nothing to compare" in once
    assert "graded 50.0 ± 2.5 points" in once
    none = verdict(run(tmp_path / "none", metrics=[metric(i) for i in range(9)]))
    assert "was not evaluated on held-out prompts" in none
    page = run(tmp_path / "unscored", evaluations=[evaluation(0), evaluation(9)])
    assert "No reward was measured on held-out prompts" in verdict(page)


def test_standard_error_is_that_of_a_proportion_and_never_zero():
    assert standard_error(0.3, 10_000) == pytest.approx(math.sqrt(0.3 * 0.7 / 10_000), rel=1e-3)
    assert standard_error(1.0, 5) == pytest.approx(math.sqrt(6 / 7 * 1 / 7 / 7))
    assert (
        Change("s", 0.0, 1.0, math.hypot(standard_error(0, 2), standard_error(1, 2)), True).kind
        == "rose"
    )
    assert (
        Change("s", 0.8, 1.0, math.hypot(standard_error(0.8, 5), standard_error(1, 5)), True).kind
        == "noise"
    )


HEALTHY = [metric(i) for i in range(40)]


def with_last(count, **values):
    return [metric(i, **(values if i >= 40 - count else {})) for i in range(40)]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (HEALTHY, None),
        (with_last(20, **{"group/zero_variance": 0.52}), "52 % of the groups"),
        (with_last(20, **{"group/zero_variance": 0.50}), None),
        (with_last(10, **{"group/zero_variance": 0.8}), None),
        (with_last(1, skipped_updates=2), "Skipped updates: 2"),
        (with_last(1, failures=3), "Failed scores: 3"),
        (with_last(2, **{"log_prob/noise": 6e-5}), "6e−5, more than half the clip range of 1e−4, in 2 of 40"),
        (with_last(2, **{"log_prob/noise": 4e-5}), None),
        (with_last(1, **{"group/duplicates": 1}), "Duplicates: 1"),
        (with_last(20, **{"group/diversity": 0.1}), "group/diversity fell by 50 %"),
        (with_last(20, **{"group/diversity": 0.185}), None),
    ],
)  # fmt: skip
def test_warnings_from_metrics_appear_exactly_when_they_should(tmp_path, metrics, words):
    found = warnings(Records(run(tmp_path, metrics=metrics)))
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
    assert ('class="card warnings"' in report(tmp_path)) == (words is not None)


def test_equal_rewards_are_no_fault_where_samples_are_not_compared(tmp_path):
    metrics = with_last(20, **{"group/zero_variance": 1.0})
    config = "[loss]\nkind = 'reward_gradient'\n"
    assert warnings(Records(run(tmp_path, metrics=metrics, config=config))) == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"graded": 0.5, "strict": 0.5}, {"graded": 0.7, "strict": 0.3}, "strict is not trained on, and fell"),
        ({"graded": 0.5, "strict": 0.5}, {"graded": 0.7, "strict": 0.7}, None),
        ({"graded": 0.5, "strict": 0.5}, {"graded": 0.5, "strict": 0.3}, None),
    ],
)  # fmt: skip
def test_a_score_that_falls_while_a_trained_one_rises_is_warned_of(tmp_path, before, after, words):
    folder = run(tmp_path, evaluations=[evaluation(0, **before), evaluation(9, **after)])
    found = warnings(Records(folder))
    assert (words in found[0]) if words else found == []


@pytest.mark.parametrize(("after", "warned"), [(0.79, True), (0.82, False)])
def test_fall_of_held_out_diversity_is_warned_of(tmp_path, after, warned):
    ends = [
        evaluation(0, graded=0.5, metrics={"diversity/color": 0.9}),
        evaluation(9, graded=0.7, metrics={"diversity/color": after}),
    ]
    folder = run(tmp_path, evaluations=ends)
    assert any("diversity/color fell by" in w for w in warnings(Records(folder))) == warned
    assert "diversity/color fell by" in verdict(folder)


def test_noise_without_a_known_clip_range_is_not_warned_of(tmp_path):
    folder = run(tmp_path, metrics=with_last(2, **{"log_prob/noise": 1.0}), config="")
    assert warnings(Records(folder)) == []


def test_everything_from_files_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    ends = [evaluation(i, **{evil: 0.1 + i / 20}) for i in (0, 9)]
    for line in ends:
        line["by_class"] = {evil: {evil: 0.1, "images": 9}}
        line["metrics"] = {f"diversity/{evil}": 1.0 - line["iteration"] / 10}
    config = f'[model]\npath = "{evil}"\n[[rewards]]\nmodel = "{evil}"\n'
    folder = run(
        tmp_path / "<b>&run",
        metrics=[
            {"iteration": i, evil: i, f"step/1/{evil}": i, "other" + evil: 1.0} for i in range(9)
        ],
        evaluations=ends,
        timings=[{"iteration": 1, evil: 1.0}],
        config=config,
        environment={evil: evil, "device": evil},
    )
    (folder / "grids").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "grids" / '9"><script>.png')
    page = without_script(report(folder))
    assert "<script" not in page
    assert "<b>&run" not in page
    assert page.count("&lt;script&gt;") > 10
    checker = Checker()
    checker.feed(page)
    assert checker.open == []


def test_runs_of_earlier_versions_are_readable(tmp_path):
    """They have the key "measures" in place of "metrics", "judge" in place of "scoring", and the file
    inspection.html in place of credit.html."""
    ends = [evaluation(i, metrics={"diversity/color": 0.9 - i / 100}, graded=0.5) for i in (0, 9)]
    new = Records(run(tmp_path / "new", evaluations=ends)).held_out_metrics()
    for line in ends:
        line["measures"] = line.pop("metrics")
    old = Records(run(tmp_path / "old", evaluations=ends)).held_out_metrics()
    assert old == new == {"diversity/color": [(0, 0.9), (9, pytest.approx(0.81))]}
    timing = {"iteration": 0, "rollout": 1.0, "total": 1.6}
    new = run(tmp_path / "c", evaluations=ends, timings=[timing | {"scoring": 0.3}])
    old = run(tmp_path / "d", evaluations=ends, timings=[timing | {"judge": 0.3}])
    assert curves.times(Records(old)) == curves.times(Records(new))
    assert "reward models, in parallel" in curves.times(Records(old))
    (new / "credit.html").write_text("<p>the credit</p>")
    (new / "inspect.html").write_text("<p>a page of flowgrpo inspect</p>")
    (old / "inspection.html").write_text("<p>the credit</p>")
    for folder in (new, old):
        assert "<p>the credit</p>" in report(folder)
        assert "a page of" not in report(folder)


def test_notes_on_prompts_and_grids_of_videos_are_shown(tmp_path):
    run(tmp_path, metrics=[metric(0)], evaluations=[evaluation(0, graded=0.4)])
    (tmp_path / "notes.json").write_text(json.dumps({"notes": ["training prompts: 3 of 4 <cut>"]}))
    (tmp_path / "grids").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "grids" / "000000.png")
    (tmp_path / "grids" / "000000.mp4").write_bytes(b"a video")
    page = report(tmp_path)
    assert "<li>Training prompts: 3 of 4 &lt;cut&gt;.</li>" in page
    assert 'src="data:video/mp4;base64,YSB2aWRlbw=="' in page
    assert "media-src data:" in page
    assert "data:image/png" not in page


def test_optional_files_may_all_be_missing(tmp_path):
    page = report(run(tmp_path, evaluations=[evaluation(0, graded=0.5)], config=""))
    for part in ("Comparison grid", "Time", "Training metrics", "Configuration", "Environment"):
        assert f"<h2>{part}" not in page
        assert f"<summary>{part}" not in page


def test_without_any_line_there_is_an_error(tmp_path):
    folder = run(tmp_path, timings=[{"iteration": 0, "total": 1.0}])
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor evaluations\.jsonl"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("metrics.jsonl", '{"iteration": 2, "rew', "not valid JSON"),
        ("metrics.jsonl", "[1, 2]", "JSON object"),
        ("metrics.jsonl", '{"reward": 1.0}', "whole number 'iteration'"),
        ("metrics.jsonl", '{"iteration": 2, "reward": "high"}', "'reward' must be a number"),
        ("timings.jsonl", "nonsense", "not valid JSON"),
        ("evaluations.jsonl", '{"iteration": 2}', "table 'scores'"),
        ("evaluations.jsonl", '{"iteration": 2, "scores": {"a": []}}', "'a' must be a number"),
    ],
)
def test_broken_line_is_named(tmp_path, name, line, words):
    run(tmp_path, metrics=[metric(0)], evaluations=[evaluation(0, graded=0.5)])
    good = {"metrics.jsonl": metric(0), "evaluations.jsonl": evaluation(0, graded=0.5)}
    first = json.dumps(good.get(name, {"iteration": 0, "total": 1.0}))
    (tmp_path / name).write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=f"{name}, line 2: .*{words}"):
        write_report(tmp_path)


def test_broken_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.toml: not valid TOML"):
        write_report(run(tmp_path, metrics=[metric(0)], config="a = "))


def test_of_repeated_iterations_the_last_line_counts(tmp_path):
    lines = [metric(0), metric(1, failures=5), metric(2), metric(1), metric(2)]
    records = Records(run(tmp_path, metrics=lines))
    assert [m["iteration"] for m in records.metrics] == [0, 1, 2]
    assert warnings(records) == []


def test_missing_and_infinite_values_leave_gaps(tmp_path):
    values = [1.0, math.nan, math.inf, 2.0, 3.0]
    page = report(
        run(tmp_path, metrics=[{"iteration": i, "reward": v} for i, v in enumerate(values)])
    )
    assert "nan" not in page
    assert "inf " not in page
    nulls = report(run(tmp_path, metrics=[{"iteration": i, "reward": None} for i in range(3)]))
    assert "no finite values" in nulls
