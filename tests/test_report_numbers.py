"""The numbers of the report: what is computed from the lines of a run, against tables made by hand."""

import math
import re

import pytest

from flowgrpo.evaluation import bench_section, curves
from flowgrpo.evaluation.records import Change, Records
from flowgrpo.evaluation.warnings import warnings
from tests.test_report import CONFIG, evaluation, metric, report, run, text_of, verdict


def rows_of(html):
    """The text of all cells of a table, row by row."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r) for r in rows]
    return [
        [re.sub(r"<[^>]*>", "", c).replace("\N{NO-BREAK SPACE}", " ") for c in r] for r in cells
    ]


def minis_of(html):
    """Title, number and text below of each small chart."""
    found = re.findall(
        r'<figure class="card mini"><h3>(.*?)</h3>.*?</svg>(.*?)</figure>', html, re.DOTALL
    )
    return [(re.sub(r"<[^>]*>", "", t), re.sub(r"<[^>]*>", "", b)) for t, b in found]


# Times.


def test_times_by_phase(tmp_path):
    timings = [
        {"iteration": 0, "rollout": 1.0, "train": 0.5, "scoring": 0.3, "total": 1.6},
        {"iteration": 1, "rollout": 2.0, "train": 0.5, "scoring": None, "total": 2.6},
        {"iteration": 2, "rollout": 3.0, "train": None, "scoring": 0.5, "refill": 0.25},
    ]  # fmt: skip
    ends = [evaluation(i, graded=0.5) for i in (0, 3)]
    ends[1]["seconds"] = 5.0
    records = Records(run(tmp_path, timings=timings, evaluations=ends))
    html = curves.times(records)
    # Without a total, it is the sum of the phases. The whole is 6 + 1 + 0.25 + 0.2 + 8 = 15.45 s.
    assert rows_of(html) == [
        ["", "median", "longest", "share of all"],
        ["rollout", "2.0 s", "3.0 s", "39 %"],
        ["train", "500 ms", "500 ms", "6 %"],
        ["other", "100 ms", "100 ms", "1 %"],
        ["refill", "250 ms", "250 ms", "2 %"],
        ["evaluation", "4.0 s", "5.0 s", "52 %"],
        ["reward models, in parallel with the rollout", "400 ms", "500 ms", ""],
        ["iteration", "2.6 s", "3.2 s", ""],
    ]
    assert re.findall(r'<i class="s(\d)"></i>(\w+)', html) == [("0", "rollout"), ("1", "train"), ("2", "other"), ("3", "refill"), ("4", "evaluation")]  # fmt: skip
    assert "its share of 15.4 s" in html
    assert 'aria-label="rollout 39 %, train 6 %, other 1 %, refill 2 %, evaluation 52 %"' in html
    # The header's time: 1.6 + 2.6 + 3.25 and the two evaluations.
    assert "15.4 s" in text_of(report(tmp_path))
    # Runs of this version record the time of evaluations with the times.
    timings[1]["evaluation"] = 9.0
    assert curves.evaluation_seconds(Records(run(tmp_path, timings=timings, evaluations=ends))) == [
        9.0
    ]
    # What is not accounted for is left out below a hundredth.
    timings = [{"iteration": i, "rollout": 1.0, "total": 1.01} for i in range(2)]
    folder = run(tmp_path / "b", timings=timings, metrics=[metric(0)])
    assert [r[0] for r in rows_of(curves.times(Records(folder)))] == ["", "rollout", "iteration"]
    timings = [{"iteration": i, "rollout": 1.0, "total": 1.02} for i in range(2)]
    folder = run(tmp_path / "c", timings=timings, metrics=[metric(0)])
    assert [r[0] for r in rows_of(curves.times(Records(folder)))] == ["", "rollout", "other", "iteration"]  # fmt: skip
    # A total below its parts is no negative time.
    folder = run(tmp_path / "d", timings=[{"iteration": 0, "rollout": 2.0, "total": 1.0}], metrics=[metric(0)])  # fmt: skip
    assert "100 %" in curves.times(Records(folder))
    folder = run(tmp_path / "e", timings=[{"iteration": 0, "rollout": 0.0}], metrics=[metric(0)])
    assert curves.times(Records(folder)) == ""
    folder = run(tmp_path / "f", evaluations=ends)
    assert curves.times(Records(folder)) == "", "the time of evaluations alone is not shown"


# Metrics of training.


def test_metrics_are_shown_as_curves_by_step_or_as_constants(tmp_path):
    lines = [
        {
            "iteration": i, "reward": 0.1 * i, "lr": 1e-3, "unknown/thing": 2.5 * i, "grad_norm": float(i),
            "step/10/clip_fraction": 0.5 if i < 2 else 0.25, "step/2/clip_fraction": 0.125, "failures": 0.0,
            "score/graded": 0.5 + i,
        }
        for i in range(22)
    ]  # fmt: skip
    html = curves.training_metrics(Records(run(tmp_path, metrics=lines)))
    assert minis_of(html) == [
        ("Score: graded 12", "Raw mean on training samples. Rises if trained on; should not fall if its weight is 0."),
        ("Gradient norm 11.5", "Before clipping. Within one order of magnitude, without spikes."),
        ("unknown/thing 28.8", ""),
        ("Clip fraction by step", "By denoising step, last 20 iterations. Share of actions beyond the clip range. Similar at all steps."),
    ]  # fmt: skip
    constants = re.findall(r'<p class="card constants">(.*?)</p>', html)
    assert constants == ["Constant throughout: learning rate <b>0.001</b>, failed scores <b>0</b>."]
    # Steps in order of their numbers; means of the last 20.
    assert re.findall(r"clip_fraction, (step \d+: [0-9.]*)<", html) == ["step 2: 0.125", "step 10: 0.25"]  # fmt: skip
    assert "Constant throughout" not in curves.training_metrics(Records(run(tmp_path / "b", metrics=[{"iteration": i, "lr": float(i)} for i in range(3)])))  # fmt: skip


@pytest.mark.parametrize(
    ("number", "noise", "window"),
    [(44, 1.0, None), (45, 1.0, 3), (75, 1.0, 5), (75, 0.01, None)],
)
def test_long_noisy_curves_get_a_moving_average(tmp_path, number, noise, window):
    values = [i / number + noise * (-1) ** i for i in range(number)]
    lines = [{"iteration": i, "reward": v} for i, v in enumerate(values)]
    html = curves.main_curves(Records(run(tmp_path, metrics=lines)))
    faint, names = html.count("line faint s2"), re.findall(r'<i class="s2"></i>([^<]*)', html)
    if window is None:
        assert (faint, names) == (0, ["reward"])
        assert html.count('class="line s2"') == 1
    else:
        assert (faint, names) == (1, [f"reward, mean over {window} iterations"])
        half = window // 2
        first = sum(values[: half + 1]) / (half + 1)
        shown = re.findall(r"mean over \d iterations: ([^<]*)<", html)[0].replace("−", "-")
        assert float(shown) == pytest.approx(first, rel=5e-3)


def test_held_out_curves_are_in_points_if_scores_are_shares(tmp_path):
    ends = [evaluation(i, graded=0.5 + i / 10, strict=0.25, aesthetic=5.0 + i, metrics={"diversity/color": 0.9 - i / 10}) for i in (0, 1, 2)]  # fmt: skip
    for line in ends:
        line["errors"] = {"graded": 0.02, "aesthetic": 0.5}
    records = Records(run(tmp_path, evaluations=ends))
    html = curves.main_curves(records)
    assert "<h3>Held-out scores in points, ± standard error</h3>" in html
    assert re.findall(r"<title>(\w+, iteration \d: [^<]*)<", html) == [
        "graded, iteration 0: 50 ± 2", "graded, iteration 1: 60 ± 2", "graded, iteration 2: 70 ± 2",
        "strict, iteration 0: 25 ± 2.16", "strict, iteration 1: 25 ± 2.16", "strict, iteration 2: 25 ± 2.16",
    ]  # fmt: skip
    assert re.findall(r'<i class="s(\d)"></i>(\w+)', html) == [("0", "graded"), ("1", "strict")]
    others = curves.held_out_metrics(records)
    assert [t for t, _ in minis_of(others)] == ["aesthetic 7", "Diversity: color 0.7"]
    assert "aesthetic, iteration 1: 6 ± 0.5" in others
    assert "diversity/color, iteration 2: 0.7<" in others
    # Without a share, the first score alone; without a known error, no ±.
    ends = [evaluation(i, aesthetic=5.0 + i, other=7.0 + i) for i in (0, 1)]
    records = Records(run(tmp_path / "b", evaluations=ends))
    html = curves.main_curves(records)
    assert "<h3>Held-out score</h3>" in html
    assert re.findall(r"<title>(\w+, iteration \d: [^<]*)<", html) == ["aesthetic, iteration 0: 5", "aesthetic, iteration 1: 6"]  # fmt: skip
    assert [t for t, _ in minis_of(curves.held_out_metrics(records))] == ["other 8"]


# Records.


def test_values_of_a_metric(tmp_path):
    values = [100.0, *[1.0] * 10, math.nan, math.inf, *[3.0] * 8]
    lines = [{"iteration": i, "a": v} for i, v in enumerate(values)] + [{"iteration": 30, "b": None}]  # fmt: skip
    records = Records(run(tmp_path, metrics=lines))
    # The last 20 of 21 values, two of which are not finite.
    assert records.recent("a") == pytest.approx((10 + 24) / 18)
    assert records.total("a") == 100 + 10 + 24
    assert records.series("a")[0] == (0, 100.0)
    assert len(records.series("a")) == 21
    assert math.isnan(records.series("b")[0][1])
    assert math.isnan(records.recent("b"))
    assert records.setting("algorithm.group_size") == 16
    assert records.setting("algorithm.kind.more") is None
    assert records.weights() == {"graded": 1.0, "strict": 0.0}


def test_scores_classes_and_grids_of_a_run(tmp_path):
    ends = [evaluation(i, strict=0.5, graded=0.5, other=1.5) for i in (0, 1, 2)]
    ends[0]["by_class"] = {"a": {"graded": 1.0, "images": 3}, "b": {}}
    ends[1]["by_class"] = {"ignored": {}}
    ends[2]["by_class"] = {"c": {"graded": None, "strict": 1.25}, "a": {"graded": 0.5, "errors": {"graded": 0.125}}}  # fmt: skip
    folder = run(tmp_path, evaluations=ends)
    (folder / "grids").mkdir()
    for name in ("000001.png", "000012-a.png", "000012-b.png", "last.png", "000002.png"):
        (folder / "grids" / name).touch()
    records = Records(folder)
    assert records.scores() == ["graded", "other", "strict"], "those that are trained on first"
    assert records.tasks() == ["a", "b", "c"]
    # In all evaluations and classes.
    assert [records.in_points(s) for s in ("graded", "strict", "other")] == [True, False, False]
    assert [g.name for g in records.grids] == ["000012-a.png", "000012-b.png"]
    assert records.held_out("graded", 2, "a") == (0.5, 0.125)
    mean, error = records.held_out("graded", 0, "a")
    assert (mean, error) == (1.0, pytest.approx(math.sqrt(4 / 5 * 1 / 5 / 5)))
    assert records.held_out("other", 0) == (1.5, None)
    change = records.change("graded", "a")
    assert (change.name, change.before, change.after, change.in_points) == ("a", 1.0, 0.5, True)
    assert change.error == pytest.approx(math.hypot(error, 0.125))
    assert records.change("graded", "b").kind == "unmeasured"
    assert records.change("other").error is None


@pytest.mark.parametrize(
    ("before", "after", "error", "text"),
    [
        (5.1, 5.12, None, "5.100 to 5.120, +0.020"),
        (5.0, 5.5, 0.03, "5.00 to 5.50, +0.50 ± 0.03"),
        (2.0, -3.0, 0.1, "2.0 to −3.0, −5.0 ± 0.1"),
        (1000.0, 1020.0, None, "1,000 to 1,020, +20"),
        (1.0, 1.0 + 1e-9, None, "1.000000 to 1.000000, +0.000000"),
        (1.0, 1.0, 0.25, "1 to 1, 0 ± 0.25"),
        (1.0, math.nan, None, "1 to –, –"),
    ],
)
def test_a_change_is_shown_with_enough_decimals(before, after, error, text):
    change = Change("s", before, after, error, False)
    said = f"{change.show(before)} to {change.show(after)}, {change.difference}"
    assert said.replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("before", "after", "error", "kind", "words"),
    [
        (0.0, 2.0, 1.0, "noise", "stayed within noise"),
        (0.0, 2.01, 1.0, "rose", "rose"),
        (0.0, -2.01, 1.0, "fell", "fell"),
        (0.0, 1.0, None, "unknown", "rose"),
        (0.0, 0.0, None, "unknown", "did not change"),
        (0.0, math.nan, 1.0, "unmeasured", "could not be measured"),
    ],
)
def test_a_change_beyond_two_standard_errors_is_no_noise(before, after, error, kind, words):
    change = Change("s", before, after, error, False)
    assert (change.kind, change.words) == (kind, words)


def test_diversities_are_those_of_evaluations_or_of_rollouts(tmp_path):
    lines = [metric(i, **{"group/diversity": float(i)}) for i in range(50)]
    ends = [evaluation(i, graded=0.5, metrics={"diversity/x": 1.0 - i, "other": 3.0}) for i in (0, 1)]  # fmt: skip
    both = Records(run(tmp_path / "a", metrics=lines, evaluations=ends))
    assert [(c.name, c.before, c.after, c.error) for c in both.diversities()] == [("diversity/x", 1.0, 0.0, None)]  # fmt: skip
    alone = Records(run(tmp_path / "b", metrics=lines)).diversities()
    assert [(c.name, c.before, c.after) for c in alone] == [("group/diversity", 9.5, 39.5)]
    assert len(Records(run(tmp_path / "c", metrics=lines[:40])).diversities()) == 1
    assert Records(run(tmp_path / "d", metrics=lines[:39])).diversities() == []
    # A fall of just a tenth is none to warn of; nor one from 0.
    for first, last, number in ((1.0, 0.9001, 0), (1.0, 0.8999, 1), (0.0, -1.0, 0)):
        ends = [evaluation(i, graded=0.5, metrics={"diversity/x": v}) for i, v in ((0, first), (1, last))]  # fmt: skip
        folder = run(tmp_path / f"e{last}", evaluations=ends)
        found = [w for w in warnings(Records(folder)) if "diversity/x" in w]
        assert len(found) == number
    assert "Diversity: diversity/x fell by 10.0 % from" in verdict(tmp_path / "e0.8999")


# The page.


def test_the_header_the_tiles_and_the_table_by_task(tmp_path):
    ends = [evaluation(0, graded=0.5, strict=0.2, other=5.0), evaluation(8, graded=0.7, strict=0.2, other=6.0)]  # fmt: skip
    for line, colors in zip(ends, (0.25, 0.75), strict=True):
        line["by_class"]["colors_attr"] = {"graded": colors, "images": 100}
        del line["by_class"]["colors"]
    lines = [metric(i) for i in range(8)]
    folder = run(tmp_path / "my run", metrics=lines, evaluations=ends, environment={"device": "cuda:0"})  # fmt: skip
    page = report(folder)
    chips = re.findall(r"<li>([^<]*)</li>", page[: page.index("</header>")])
    assert chips == ["8 of 40 iterations", "algorithm flow_grpo", "model shapes", "groups of 16", "on cuda:0", "6.0 s"]  # fmt: skip
    tiles = re.findall(r'<div class="tile (\w+)"><div class="name"><b>(\w+)</b><span>([^<]*)</span></div><div class="values">(.*?)</div><div class="move">(.*?)</div>', page)  # fmt: skip
    assert [tuple(re.sub("<[^>]*>", "", t).replace("\N{NO-BREAK SPACE}", " ") for t in tile) for tile in tiles] == [
        ("rose", "graded", "trained on", "50.0 → 70.0", "▲ +20.0 ± 3.4 points, rose"),
        ("unknown", "other", "", "5.0 → 6.0", " +1.0, error unknown"),
        ("noise", "strict", "not trained on", "20.0 → 20.0", "≈ 0.0 ± 2.8 points, within noise"),
    ]  # fmt: skip
    section = page[page.index("<h2>By task") :].split("</section>")[0]
    tables = [rows_of(t) for t in re.findall(r"<table>(.*?)</table>", section)]
    assert [r[:4] for r in tables[0]] == [
        ["", "before", "after", "change"],
        ["all", "50.0", "70.0", "▲ +20.0 ± 3.4"],
        ["counting", "50.0", "70.0", "▲ +20.0 ± 4.8"],
        ["colors attr", "25.0", "75.0", "▲ +50.0 ± 6.1"],
    ]
    assert len(tables) == 3
    # Shares on a scale from 0 to 1, other scores on one from their lowest to their highest.
    dots = re.findall(r'class="before" cx="([^"]*)".*?class="after" cx="([^"]*)"', section)
    assert dots[0] == ("75.0", "102.2")
    assert dots[3] == ("7.0", "143.0")
    said = text_of(page)
    assert "Held-out scores are mixed: graded rose, strict stayed within noise." in said
    assert "After 8 iterations, graded rose from 50.0 to 70.0 points" in said
    assert "Of 2 tasks, graded rose in 2, fell in 0 and stayed within noise in 0." in said
    assert "400 held-out images." in said
    assert "upper limit" in said
    assert "The error of scores without ± is unknown" in said


def test_several_scores_that_agree_and_a_run_without_evaluations(tmp_path):
    ends = [evaluation(0, a=0.5, b=0.5), evaluation(8, a=0.7, b=0.7)]
    assert "Held-out scores rose." in verdict(run(tmp_path / "a", evaluations=ends))
    ends = [evaluation(0, a=0.5, b=5.0), evaluation(8, a=0.5, b=9.0)]
    assert "No change beyond noise" in verdict(run(tmp_path / "b", evaluations=ends))
    lines = [metric(i, reward=float(i)) for i in range(30)]
    said = verdict(run(tmp_path / "c", metrics=lines))
    assert "The reward on training samples changed from 1 to 28." in said
    once = verdict(run(tmp_path / "d", evaluations=[evaluation(7, a=0.5, b=5.0)]))
    assert "After 7 iterations: a 50.0 ± 2.5 points, b 5." in once


# Benchmarks.


def table_of(value, change=None, interval=(0.25, 0.75), **more):
    table = {
        "title": "A <bench>", "images": 20, "failed": 0, "folder": "bench/x/000000", "main": ["overall"],
        "results": {"overall": value, "part": None}, "intervals": {"overall": list(interval), "part": [None, None]},
        "changes": {"overall": change} if change else {},
    }  # fmt: skip
    return table | more


def benched(folder, *tables):
    lines = [evaluation(i, graded=0.5) | {"bench": {"x": t}} for i, t in enumerate(tables)]
    return Records(run(folder, evaluations=lines, config=CONFIG))


def test_results_of_benchmarks_before_and_after(tmp_path):
    change = [0.2, 0.1, 0.3]
    last = table_of(0.7, change, images=24, failed=4, folder="bench/x/000002")
    html = bench_section.benchmarks(benched(tmp_path / "a", table_of(0.5), {"problem": "judge away"}, last))  # fmt: skip
    assert "<h3>A &lt;bench&gt;</h3>" in html
    assert "24 images, 4 failed; <code>bench/x/000002</code>" in html
    assert rows_of(html) == [
        ["", "before", "after", "change", "95 % interval"],
        ["overall", "0.5", "0.7", "▲ 0.2", "0.1 to 0.3"],
        ["part", "–", "–", "–", "–"],
    ]
    assert html.count('<tr class="all">') == 1
    assert '<span class="rose">' in html
    assert "<svg" not in html, "two results are no curve"
    three = benched(tmp_path / "b", table_of(0.5), table_of(0.6, change), table_of(0.7, change))
    html = bench_section.benchmarks(three)
    assert re.findall(r"<title>(overall, iteration \d: [^<]*)<", html) == [f"overall, iteration {i}: 0.{5 + i}" for i in range(3)]  # fmt: skip
    assert re.findall(r'<i class="s(\d)"></i>(\w+)', html) == [("0", "overall")]
    once = bench_section.benchmarks(benched(tmp_path / "c", table_of(0.5)))
    assert rows_of(once) == [
        ["", "result", "95 % interval"],
        ["overall", "0.5", "0.25 to 0.75"],
        ["part", "–", "–"],
    ]
    assert "failed" not in once
    absent = benched(tmp_path / "d", {"problem": "judge away"})
    assert bench_section.benchmarks(absent) == ""
    assert bench_section.problems(absent) == ["The benchmark x has no results after 0 iterations: judge away"]  # fmt: skip
    assert warnings(absent)[0].startswith("The benchmark x has no results")


@pytest.mark.parametrize(
    ("change", "direction", "shown"),
    [
        ([0.2, 0.1, 0.3], 1, "▲ 0.2"),
        ([-0.2, -0.3, -0.1], -1, "▼ −0.2"),
        ([0.2, 0.0, 0.3], 0, "≈ 0.2"),
        ([-0.2, -0.3, 0.0], 0, "≈ −0.2"),
        ([0.2, None, 0.3], 0, "≈ 0.2"),
        ([0.2, 0.1, None], 0, "≈ 0.2"),
    ],
)
def test_a_change_whose_interval_holds_0_may_be_noise(tmp_path, change, direction, shown):
    assert bench_section.direction(change) == direction
    html = bench_section.benchmarks(benched(tmp_path, table_of(0.5), table_of(0.7, change)))
    assert rows_of(html)[1][3] == shown
    assert (rows_of(html)[1][4] == "–") is (None in change)
