"""The report and the contact sheet in a real browser: chromium, driven by Playwright.

One browser runs all tests of this file. They are skipped where there is no chromium, unless
``FLOWGRPO_REQUIRE_BROWSER`` is set, as in continuous integration.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowgrpo.bench.comparison import Setting
from flowgrpo.bench.comparison import rows as differences
from flowgrpo.bench.comparison_files import Comparison, Pair
from flowgrpo.bench.comparison_files import write as write_comparison
from flowgrpo.bench.run_scores import AXES, CurvePoint
from flowgrpo.data.votes import read_votes
from flowgrpo.evaluation.comparison_grid import write_grid
from flowgrpo.evaluation.contact_sheet import SheetPrompt, SheetRow, media_uri, write_sheet
from flowgrpo.evaluation.grid_drawing import GridRow
from flowgrpo.evaluation.report import write_report
from flowgrpo.evaluation.report_server import ReportServer
from flowgrpo.evaluation.samples import Sample, save_samples, thumbnail
from flowgrpo.evaluation.vote_server import VoteServer
from tests.test_compare import measured
from tests.test_report import evaluation, metric, run
from tests.test_votes import ballot_of

EVIL = "<img src=x onerror='window.evil = 1'><script>window.evil = 1</script> a \"photo\" & more"
LONG = "an_unbroken_name_" * 12
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync",
]  # fmt: skip
PHONE, DESKTOP = (390, 844), (1200, 900)

OFF_SCREEN = """() => {
  // Tables and pictures that are wider than a phone scroll inside of their own box.
  const scrolls = (e) => e && (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.body.querySelectorAll("*")].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1) && !scrolls(e.parentElement);
  }).map((e) => e.outerHTML.slice(0, 120));
}"""

CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4));
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]); };
  const background = (e) => {
    if (!e) return [255, 255, 255];
    const own = channels(getComputedStyle(e).backgroundColor);
    return own[3] === 0 ? background(e.parentElement) : over(own, own[3] === undefined ? own : background(e.parentElement));
  };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent).join("").trim();
    if (!text || !e.getClientRects().length || ["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const color = channels(e.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [light(color), light(background(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className}: ${text.slice(0, 40)}`);
  }
  return found;
}"""
"""Texts whose contrast is below that of WCAG 2.2, success criterion 1.4.3: 4.5, and 3 for large text."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = pytest.fail if os.environ.get("FLOWGRPO_REQUIRE_BROWSER") else pytest.skip
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        missing("there is no chromium here: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install -e '.[dev]'")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page, and asserts in the end that the browser complained about nothing."""
    contexts, complaints = [], []

    def show(address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        contexts.append(context)
        context.set_default_timeout(5000)
        context.set_offline(address.startswith("file:"))
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)  # fmt: skip
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(address)
        return page

    show.complaints = complaints  # type: ignore[attr-defined]
    yield show
    for context in contexts:
        context.close()
    assert complaints == []


def all_images_load(page: Any) -> bool:
    return bool(page.evaluate("async () => { const all = [...document.images]; for (const i of all) { i.loading = 'eager'; await i.decode(); } return all.length > 3 && all.every((i) => i.naturalWidth > 0); }"))  # fmt: skip


def draw(folder: Path, iteration: int, level: float) -> None:
    """A comparison grid whose trained images have a level of grey, and the samples."""
    base, tuned = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), level)
    rows = [GridRow(p, [base, tuned], [["✗", "✗"], ["✓", "✓"]]) for p in (EVIL, LONG)]
    columns = ["base", f"after {iteration} iterations"]
    path = folder / "grids" / f"{iteration:06d}.png"
    write_grid(rows, columns, path, title="a title", subtitle="a subtitle", fps=16.0)
    samples = [Sample(g, EVIL, 0.5, {EVIL: 0.5, LONG: 1.0}, thumbnail(tuned[0])) for g in ("highest", "lowest")]  # fmt: skip
    save_samples(folder / "samples" / f"{iteration:06d}.png", samples)


def followed(folder: Path) -> Path:
    """A run of two evaluations."""
    run(
        folder,
        metrics=[metric(i, nfe_per_prompt=68.0, decodes_per_prompt=16.0) for i in range(20)],
        evaluations=[evaluation(0, graded=0.5, strict=0.4), evaluation(20, graded=0.7, strict=0.3)],
        timings=[{"iteration": i, "rollout": 1.0, "train": 0.5, "total": 1.5} for i in range(20)],
        environment={"device": "cpu", "command": LONG, "note": EVIL},
    )
    for iteration, level in ((0, 0.0), (10, 0.5), (20, 1.0)):
        draw(folder, iteration, level)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(followed(tmp_path_factory.mktemp("runs") / "a run")).as_uri()


def grey(page: Any) -> int:
    """The level of the first image of the film strip, from 0 to 255."""
    return int(
        page.evaluate("""async () => {
      const image = document.querySelector(".film-tiles img"), canvas = document.createElement("canvas");
      await image.decode();
      const pen = canvas.getContext("2d");
      pen.drawImage(image, 0, 0);
      return pen.getImageData(20, 20, 1, 1).data[0];
    }""")
    )


def test_a_report_opens_from_disk_and_its_slider_goes_from_base_to_tuned(show, finished):
    page = show(finished)
    assert all_images_load(page)
    slider = page.get_by_role("slider", name="Iterations trained")
    output = page.locator(".film-bar output")
    assert (output.inner_text(), grey(page)) == ("after 20 iterations", 255)
    slider.fill("0")
    assert (output.inner_text(), grey(page)) == ("base model", 0)
    assert "graded 50.0" in page.locator(".film-scores").inner_text()
    slider.press("ArrowRight")
    assert (output.inner_text(), grey(page)) == ("after 10 iterations", 128)
    first = page.locator(".film-tiles img").first
    first.hover()
    page.mouse.down()
    assert (output.inner_text(), grey(page)) == ("base model", 0)
    page.mouse.up()
    assert (output.inner_text(), grey(page)) == ("after 10 iterations", 128)
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Play").wait_for()  # again, after the last frame
    assert (output.inner_text(), grey(page)) == ("after 20 iterations", 255)


def test_a_prompt_with_html_is_text(show, finished):
    page = show(finished)
    assert page.locator(".film-row .prompt").first.inner_text() == EVIL
    assert EVIL in page.locator(".samples figcaption").first.inner_text()
    assert page.evaluate("window.evil") is None
    assert page.locator("main script:not([type='application/json'])").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_off_screen_and_all_text_is_readable(show, finished, scheme):
    page = show(finished, PHONE, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(14, 16, 20)") == (scheme == "dark")
    for size in (PHONE, DESKTOP):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        assert page.evaluate(OFF_SCREEN) == []
        assert page.evaluate(CONTRASTS) == []


CUT = """() => [...document.querySelectorAll("svg text")].filter((text) => {
  const [own, chart] = [text, text.ownerSVGElement].map((e) => e.getBoundingClientRect());
  return own.left < chart.left - 0.5 || own.right > chart.right + 0.5 || own.top < chart.top - 0.5 || own.bottom > chart.bottom + 0.5;
}).map((text) => text.textContent)"""
"""Labels of charts that reach beyond their chart, where they are cut."""
OVERLAPPING = """() => [...document.querySelectorAll("svg")].flatMap((chart) => {
  const boxes = [...chart.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) => p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom).map(([b]) => [a, b]));
})"""
"""Pairs of labels of one chart that overlap."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_long_labels_of_the_comparison_page_are_whole(show, tmp_path, scheme):
    """Curves over millions of evaluations, of rewards in the millions and of tiny ones."""

    def points(factor: float) -> list[CurvePoint]:
        cost = dict.fromkeys(AXES, 12345678.0)
        return [
            CurvePoint({k: v * i for k, v in cost.items()}, {"large": -factor * 9_876_543.0 - i, "small": factor * 1.2345e-6 * (i + 1), EVIL: factor * 0.5})
            for i in range(6)
        ]  # fmt: skip

    settings = [
        Setting(name, [measured(np.linspace(0, 1, 8) * f, name=name)]) for name, f in (("a", 1), (LONG, 2))
    ]  # fmt: skip
    pair = Pair("a", LONG, differences(*settings), 8)
    curves = {"a": [points(1.0)], LONG: [points(2.0)]}
    *_, file = write_comparison(Comparison([pair], settings, curves), tmp_path / "out")
    page = show(file.as_uri(), PHONE, scheme)
    assert page.locator("svg").count() >= 9
    for size in (PHONE, DESKTOP):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        assert page.evaluate(CUT) == []
        assert page.evaluate(OVERLAPPING) == []
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        assert (page.evaluate(OFF_SCREEN), page.evaluate(CONTRASTS)) == ([], [])


def test_a_contact_sheet_is_lazy_safe_and_fits_a_phone(show, tmp_path):
    file = tmp_path / "sheet.html"
    source = media_uri(torch.zeros(3, 16, 16), 16.0)
    cells = [[(source, "✓"), (source, EVIL)]] * 6
    rows = [SheetRow(label, cells) for label in (LONG, EVIL)]
    prompts = [SheetPrompt(EVIL, [], rows), *[SheetPrompt(LONG, [], rows)] * 20]
    write_sheet(file, prompts, ["base", EVIL] * 3, LONG, EVIL, json.dumps({"a": EVIL}), 1.0)
    page = show(file.as_uri(), PHONE, "dark")
    assert page.locator("img[loading=lazy]").count() == 21 * 2 * 12
    assert page.evaluate("window.evil") is None
    assert page.locator("h3").first.inner_text() == EVIL
    assert json.loads(page.locator("#flowgrpo-grid").text_content()) == {"a": EVIL}
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert (page.evaluate(OFF_SCREEN), page.evaluate(CONTRASTS)) == ([], [])
    page.locator("img").last.scroll_into_view_if_needed()
    assert all_images_load(page)


def test_a_live_page_follows_the_run(show, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with ReportServer(folder, 0, lambda: ("running", "3 of 40"), interval=0.1) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        page = show(server.address)
        page.get_by_text("Waiting for the first results").wait_for()
        followed(folder)
        page.get_by_text("20 of 40 iterations").wait_for()
        page.locator(".film-bar input[max='2']").wait_for()
        assert all_images_load(page)
        slider = page.get_by_role("slider", name="Iterations trained")
        slider.fill("1")
        page.locator("details summary").first.click()
        line = json.dumps(metric(20))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(line[:20])
            file.flush()
            server.current()  # half a line is not an error
            file.write(line[20:] + "\n")
        draw(folder, 30, 0.2)
        page.get_by_text("21 of 40 iterations").wait_for()
        page.locator(".film-bar input[max='3']").wait_for()
        assert page.locator(".film-bar output").inner_text() == "after 10 iterations"
        assert page.locator("details").first.evaluate("(d) => d.open")
        assert page.locator(".live").inner_text() == "3 of 40"
        server.shutdown()
        thread.join()
    page.get_by_text("no connection").wait_for()
    page.close()  # which goes on asking the server, with a complaint each time
    assert all("net::ERR_" in c for c in show.complaints), "the server is gone, and nothing else"
    show.complaints.clear()


def test_votes_are_cast_with_the_keyboard_and_on_a_phone(show, tmp_path):
    ballot = ballot_of(tmp_path, prompts=2)
    with VoteServer(ballot, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        page = show(server.address, PHONE, "dark")
        assert (page.evaluate(OFF_SCREEN), page.evaluate(CONTRASTS)) == ([], [])
        page.get_by_label("Your name").fill("<b>Anna</b>")
        page.keyboard.press("Enter")
        page.locator("[aria-busy=false]").wait_for()
        assert page.locator("#prompt").inner_text() == ballot.pairs[0].prompt
        assert page.evaluate("window.evil") is None
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        assert (page.evaluate(OFF_SCREEN), page.evaluate(CONTRASTS)) == ([], [])
        keys = ["ArrowLeft", "u", "ArrowRight", "ArrowDown", "s"]
        for key, done in zip(keys, [1, 0, 1, 2, 3], strict=True):
            page.keyboard.press(key)
            page.get_by_text(f"{done} of 4").wait_for()
            page.locator("[aria-busy=false]").wait_for()
        page.get_by_label("The left picture is better").click()
        page.get_by_text("All pairs are done").wait_for()
        server.shutdown()
        thread.join()
    votes = read_votes(ballot.folder)[1]
    left = ["first" if ballot.first_is_left(i, "<b>Anna</b>") else "second" for i in range(4)]
    right = "second" if left[0] == "first" else "first"
    assert [v.choice for v in votes] == [right, "tie", "skip", left[3]]
