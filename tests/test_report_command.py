"""``flowgrpo report``: the file, the server on this machine, and refusals; the samples of a report."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowgrpo import config as configuration
from flowgrpo.cli.main import main
from flowgrpo.evaluation import film_strip, tiles
from flowgrpo.evaluation.comparison_grid import write_grid
from flowgrpo.evaluation.film_strip import spread
from flowgrpo.evaluation.grid_drawing import GridRow
from flowgrpo.evaluation.report_server import ReportServer
from flowgrpo.evaluation.samples import Sample, extremes, load_samples, save_samples, thumbnail
from tests.test_report import evaluation, metric, report, run, text_of


def test_extremes_are_in_order_without_ties_at_random_and_without_nan():
    rewards = [0.5, 1.0, float("nan"), 0.0, 1.0, 0.7, 0.0]
    rows = [{"index": i, "reward": r} for i, r in enumerate(rewards)]
    found = extremes(rows, 2)
    assert list(found.items()) == [(1, "highest"), (4, "highest"), (3, "lowest"), (6, "lowest")]
    assert set(extremes(rows, 9).values()) == {"highest", "lowest"}
    assert len(extremes(rows, 9)) == 6
    assert extremes([]) == extremes([{"index": 0, "reward": 1.0}]) == {}
    equal = extremes([{"index": i, "reward": 1.0} for i in range(9)], 3)
    assert equal == dict.fromkeys((0, 1, 2), "highest")


def test_samples_are_read_as_they_were_written(tmp_path):
    image, video = torch.rand(3, 20, 30), torch.rand(5, 1, 8, 8)
    samples = [
        Sample("highest", "a <b>", 0.9, {"x": 0.9}, thumbnail(image)),
        Sample("lowest", "ü", -1.0, {}, thumbnail(video)),
    ]
    file = tmp_path / "samples" / "000003.png"
    save_samples(file, samples)
    found = load_samples(file)
    assert [(s.group, s.prompt, s.reward, s.scores) for s in found] == [("highest", "a <b>", 0.9, {"x": 0.9}), ("lowest", "ü", -1.0, {})]  # fmt: skip
    assert [s.picture.size for s in found] == [(30, 20), (3 * 8 + 2 * 2, 8)]
    pixels = torch.tensor(list(found[0].picture.getdata())).reshape(20, 30, 3)
    assert torch.equal(pixels, image.mul(255).round().permute(1, 2, 0).long())
    file.write_bytes(file.read_bytes()[:300])
    assert load_samples(file) == []
    assert thumbnail(torch.rand(3, 512, 256)).size == (128, 256)


def test_long_film_strips_are_thinned_evenly():
    assert spread(range(5), 9) == [0, 1, 2, 3, 4]
    assert spread(range(0, 101, 10), 3) == [0, 50, 100]


@pytest.mark.parametrize(
    "text", [None, "[", '[{"label": "a"}]', '[{"label": 1, "blocks": [[[1]]]}]']
)
def test_a_grid_without_sound_tiles_is_shown_as_it_is(tmp_path, text):
    folder = run(tmp_path, evaluations=[evaluation(0, graded=0.5)])
    (folder / "grids").mkdir()
    info = PngInfo()
    if text is not None:
        info.add_itxt(tiles.KEY, text)
    Image.new("RGB", (40, 20)).save(folder / "grids" / "000000.png", pnginfo=info)
    page = report(folder)
    assert "Film strip" not in page
    assert page.count("data:image/png;base64,") == 1


def test_costs_are_counted(tmp_path):
    metrics = [metric(i, nfe_per_prompt=68.0, decodes_per_prompt=16.0) for i in range(4)]
    timings = [{"iteration": i, "rollout": 2.0, "train": 1.0, "total": 3.0} for i in range(4)]
    timings[2]["evaluation"] = 5.0
    config = "[algorithm]\ngroup_size = 16\n[train]\ngroups = 10\n"
    ends = [evaluation(i, images=7, graded=0.5) for i in (0, 2)]
    for line in ends:
        del line["seconds"]
    folder = run(tmp_path, metrics=metrics, timings=timings, evaluations=ends, config=config, environment={"processes": 2})  # fmt: skip
    text = text_of(report(folder))
    assert "samples 640 160 denoiser evaluations in rollouts 2,720 680" in text
    assert "decoded images or videos 640 160 held-out images 14" in text
    assert "device-seconds of 2 devices, iterations 24 6" in text
    assert "device-seconds of 2 devices, held-out evaluations 10" in text
    assert "34.0 s of device time" in text
    assert "17.0 s" in text  # of the run, in the header
    assert "evaluation 5.0 s 5.0 s 29 %" in text


@pytest.fixture
def server(tmp_path) -> Iterator[ReportServer]:
    folder = run(tmp_path / "run", metrics=[metric(0)], evaluations=[evaluation(0, graded=0.5)])
    with ReportServer(folder, 0, lambda: ("running", "1 of 40")) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: ReportServer, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_address[1]}{path}", headers=headers)  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_server_answers_this_machine_only_and_sends_what_is_new(server):
    assert server.server_address[0] == "127.0.0.1"
    status, page = ask(server, "/")
    assert status == 200
    assert "connect-src 'self'" in page
    state = json.loads(ask(server, "/state")[1])
    assert (state["state"], state["words"]) == ("running", "1 of 40")
    assert "1 of 40 iterations" in state["content"]
    assert "content" not in json.loads(ask(server, f"/state?version={state['version']}")[1])
    with (server.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metric(1)) + "\n")
    news = json.loads(ask(server, f"/state?version={state['version']}")[1])
    assert "2 of 40 iterations" in news["content"]
    with (server.folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "rew')
    kept = json.loads(ask(server, "/state")[1])
    assert (kept["version"], kept["content"]) == (news["version"], news["content"])
    for path in ("/metrics.jsonl", "/../run/config.toml", "/state/x"):
        assert ask(server, path)[0] == 404
    assert ask(server, "/", Host="evil.example:80")[0] == 403
    assert ask(server, "/", Host="localhost:1")[0] == 200


def test_the_command_writes_a_report_and_refuses_in_one_sentence(tmp_path, capsys):
    folder = tmp_path / "run"
    config = configuration.load("quickstart_flow_grpo", [f"run.folder={folder}"])
    folder.mkdir()
    configuration.save(config, folder / "config.toml")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in [
            ([str(folder)], "neither metrics.jsonl nor evaluations.jsonl has a line"),
            ([str(tmp_path)], "is not a run directory"),
            ([str(folder), "--port", "80"], "add --serve"),
            ([str(folder), "--serve", "--out", "x.html"], "remove --out"),
            ([str(folder), "--serve", "--port", "70000"], "between 0 and 65535"),
            ([str(folder), "--serve", "--port", port], f"port {port} is taken by another program"),
            ([str(folder), "--out", "x.pdf"], "must end in .html"),
        ]:
            assert main(["report", *arguments]) in (1, 2)
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
    run(folder, metrics=[metric(0)], config="")
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "1 of 120 iterations" in out.read_text()
    assert not (folder / "report.html").exists()


def test_ctrl_c_ends_the_server_cleanly(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    config = configuration.load("quickstart_flow_grpo", [f"run.folder={folder}"])
    folder.mkdir()
    configuration.save(config, folder / "config.toml")

    def interrupted(server: ReportServer, **_: float) -> None:
        assert server.status()[0] == "stopped"
        raise KeyboardInterrupt

    monkeypatch.setattr(ReportServer, "serve_forever", interrupted)
    assert main(["report", str(folder), "--serve", "--port", "0"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith("http://127.0.0.1:")
    assert out.endswith("stopped\n")
    assert error == ""


def test_only_the_frames_of_a_film_strip_are_read(tmp_path, monkeypatch):
    folder = run(tmp_path, evaluations=[evaluation(0, graded=0.5)])
    images = torch.zeros(1, 3, 8, 8)
    for iteration in range(0, 60, 2):
        label = "another prompt" if iteration == 58 - 2 * 26 else "a prompt"
        path = folder / "grids" / f"{iteration:06d}.png"
        write_grid(
            [GridRow(label, [images, images])], ["a", "b"], path, title="t", subtitle="s", fps=8.0
        )
    opened = []
    read = film_strip.open_picture
    monkeypatch.setattr(film_strip, "open_picture", lambda p: opened.append(p.stem) or read(p))
    page = report(folder)
    assert len(opened) == 11
    assert {"000002", "000058"} <= {*opened}
    (data,) = re.findall(r'class="film-data">(.*?)</script>', page)
    names = [f["name"] for f in json.loads(data)]
    assert (names[0], names[1], names[-1]) == ("base model", "after 2 iterations", "after 58 iterations")  # fmt: skip
    assert len(names) == 12 - ("000006" in opened)
