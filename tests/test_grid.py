"""Comparison grids: positions of tiles, marks and captions, and invalid input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flowgrpo.evaluation import grid_drawing, grid_text
from flowgrpo.evaluation.comparison_grid import load_images, save_images
from flowgrpo.evaluation.grid_drawing import GridRow, animate_grid, draw_grid

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def images(*colors, size=(64, 64)):
    """One image per colour, each of one colour."""
    return torch.tensor(colors)[:, :, None, None].expand(-1, -1, *size).clone()


def grid(rows, columns=("base", "tuned"), **options):
    return draw_grid(rows, columns, title="a title", subtitle="10 steps, seed 0", **options)


def box(picture, color):
    """Bounding box of the pixels of exactly this colour, all of which must have it."""
    target = np.array([round(255 * c) for c in color])
    found = (np.asarray(picture) == target).all(-1)
    ys, xs = np.nonzero(found)
    left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    assert found[top:bottom, left:right].all()
    return left, top, right, bottom


def test_tiles_are_in_their_blocks_and_rows():
    green, cyan, pink, olive = (0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.5, 0.5, 0.0)
    rows = [
        GridRow("first", [images(RED, green), images(BLUE, cyan)]),
        GridRow("second", [images(pink, pink), images(olive, olive)]),
    ]
    picture = grid(rows)
    red, other, blue = box(picture, RED), box(picture, green), box(picture, BLUE)
    below = box(picture, cyan)
    assert red[1] == other[1] == blue[1] == below[1]
    assert red[2] < other[0] < blue[0] < below[0]
    within, between = other[0] - red[2], blue[0] - other[2]
    assert between >= 3 * within
    pinks = np.nonzero((np.asarray(picture) == [255, 0, 255]).all(-1))
    assert pinks[0].min() > red[3]
    assert pinks[1].min() == red[0]


@pytest.mark.parametrize(
    ("size", "scale", "tile"),
    [
        ((64, 64), None, (128, 128)),
        ((16, 16), None, (96, 96)),
        ((128, 128), None, (128, 128)),
        ((1024, 512), None, (256, 128)),
        ((64, 64), 3, (192, 192)),
        ((300, 300), 1, (300, 300)),
    ],
)
def test_tile_size(size, scale, tile):
    picture = grid([GridRow("p", [images(RED, size=size), images(BLUE, size=size)])], scale=scale)
    left, top, right, bottom = box(picture, RED)
    assert (bottom - top, right - left) == tile


def test_a_narrow_grid_has_its_blocks_below_each_other():
    green, cyan = (0.0, 1.0, 0.0), (0.0, 1.0, 1.0)
    row = GridRow(
        "a prompt " * 8, [images(RED, green), images(BLUE, cyan)], [["✓", ""], ["0.5", ""]]
    )
    wide, narrow = grid([row]), grid([GridRow(row.label, row.blocks)] * 2, narrow=True)
    assert narrow.width < wide.width / 2
    # Colours of the first of two rows; the second is below.
    pixels = np.asarray(narrow)
    first = {}
    for color in (RED, green, BLUE, cyan):
        ys, xs = np.nonzero((pixels == np.array(color) * 255).all(-1))
        first[color] = (xs.min(), ys.min())
    assert first[RED][1] == first[green][1] < first[BLUE][1] == first[cyan][1]
    assert first[RED][0] == first[BLUE][0] < first[green][0] == first[cyan][0]
    assert first[BLUE][1] - first[RED][1] > 128
    assert (pixels[:, -20:] == 255).all()
    # The label is above the first block, and each block has its title.
    above = pixels[first[RED][1] - 20 : first[RED][1] - 2, :200]
    between = pixels[first[RED][1] + 128 + 2 : first[BLUE][1] - 2, :200]
    assert (above < 200).any()
    assert (between < 200).any()
    assert grid([row], narrow=True).height > 300


def test_enlarged_pixels_stay_sharp():
    media = torch.zeros(1, 3, 2, 2)
    media[0, 0, 0, 0] = 1.0
    picture = grid([GridRow("p", [media])], ["base"], scale=50)
    left, top, right, bottom = box(picture, RED)
    assert (right - left, bottom - top) == (50, 50)


def test_grid_grows_with_rows_by_equal_steps():
    row = GridRow("p", [images(RED), images(BLUE)])
    heights = [grid([row] * n).height for n in (1, 2, 3)]
    assert heights[2] - heights[1] == heights[1] - heights[0] > 128
    assert {grid([row] * n).width for n in (1, 2)} == {grid([row]).width}


def test_marks_are_drawn_in_the_corner_of_their_image():
    row = GridRow("p", [images(RED), images(BLUE)], [["✓"], ["✗"]])
    plain, marked = grid([GridRow("p", row.blocks)]), grid([row])
    assert plain.size == marked.size
    changed = (np.asarray(plain) != np.asarray(marked)).any(-1)
    for color, mark in [(RED, (26, 156, 82)), (BLUE, (217, 58, 58))]:
        left, top, right, bottom = box(plain, color)
        middle = ((top + bottom) // 2, (left + right) // 2)
        corner = np.s_[middle[0] : bottom, middle[1] : right]
        assert changed[corner].any()
        assert (np.asarray(marked)[corner] == mark).all(-1).any()
        assert not (np.asarray(plain)[corner] == mark).all(-1).any()
        assert not changed[top : middle[0], left:right].any()


def test_other_notes_are_written_below_the_image():
    row = GridRow("p", [images(RED), images(BLUE)], [["0.91"], ["a note as long as " * 20]])
    plain, noted = grid([GridRow("p", row.blocks)]), grid([row])
    assert noted.height > plain.height
    left, top, right, bottom = box(noted, RED)
    pixels = np.asarray(noted)
    assert (pixels[top:bottom, left:right] == [255, 0, 0]).all()
    assert (pixels[bottom + 3 : bottom + 20, left:right] < 200).any()
    assert (pixels[bottom + 3 : bottom + 20, box(noted, BLUE)[2] + 2 :] == 255).all()


@pytest.mark.parametrize("text", ["many words " * 60, "w" * 400, "一只红色的圆圈" * 60])
def test_long_texts_never_overflow(text):
    row = GridRow(text, [images(RED), images(BLUE)])
    picture = draw_grid([row], [text, text], title=text, subtitle=text)
    pixels = np.asarray(picture)
    left, top, _, bottom = box(picture, RED)
    assert (pixels[top:bottom, left - 20 : left - 1] == 255).all()
    assert (pixels[:, -28:] == 255).all()
    assert (pixels[-8:] == 255).all()
    assert picture.width == grid([GridRow("p", row.blocks)]).width


@pytest.mark.parametrize(("frames", "shown"), [(1, [0]), (2, [0, 1]), (9, [0, 4, 8])])
def test_videos_show_first_middle_and_last_frame(frames, shown):
    video = torch.zeros(1, frames, 3, 32, 32)
    for frame in range(frames):
        video[0, frame, 1] = (frame + 10) / 255
        video[0, frame, 0] = 1.0
    picture = grid([GridRow("p", [video])], ["base"])
    boxes = [box(picture, (1.0, (f + 10) / 255, 0.0)) for f in shown]
    assert [b[0] for b in boxes] == sorted(b[0] for b in boxes)
    assert {b[1] for b in boxes} == {boxes[0][1]}
    values = set(np.unique(np.asarray(picture)[boxes[0][1] : boxes[0][3], boxes[0][0] :, 1]))
    hidden = {f + 10 for f in range(frames)} - {f + 10 for f in shown}
    assert not hidden & values


def test_grey_and_half_precision_images_are_drawn():
    grey = torch.full((1, 1, 64, 64), 0.2, dtype=torch.float16)
    assert box(grid([GridRow("p", [grey])], ["base"]), (0.2, 0.2, 0.2))


def test_values_just_outside_the_range_are_clamped():
    media = images((1.0005, -0.0005, 0.0))
    assert box(grid([GridRow("p", [media])], ["base"]), RED)


@pytest.mark.parametrize(
    ("rows", "columns", "options", "message"),
    [
        ([], ["base"], {}, "needs rows"),
        ([GridRow("p", [])], [], {}, "needs rows"),
        ([GridRow("p", [images(RED)])], ["base", "tuned"], {}, "1 block for 2 columns"),
        ([GridRow("p", [images(RED), images(RED, BLUE)])], ["a", "b"], {}, "'b': shape"),
        (
            [GridRow("p", [images(RED)]), GridRow("q", [images(RED, BLUE)])],
            ["a"],
            {},
            "'q', 'a': shape",
        ),
        ([GridRow("p", [images((1.1, 0.0, 0.0))])], ["a"], {}, r"'p', 'a': .*\[0, 1\].* to 1.1"),
        ([GridRow("p", [images((-0.5, 0.0, 0.0))])], ["a"], {}, "-0.5"),
        ([GridRow("p", [images((float("nan"), 0.0, 0.0))])], ["a"], {}, "nan"),
        ([GridRow("p", [torch.zeros(1, 4, 8, 8)])], ["a"], {}, "not images"),
        ([GridRow("p", [torch.zeros(0, 3, 8, 8)])], ["a"], {}, "not images"),
        ([GridRow("p", [images(RED)], [["✓", "✗"]])], ["a"], {}, "notes"),
        ([GridRow("p", [images(RED)])], ["a"], {"scale": 0}, "scale"),
    ],
)
def test_bad_input_raises(rows, columns, options, message):
    with pytest.raises(ValueError, match=message):
        grid(rows, columns, **options)


def test_result_is_an_rgb_picture():
    picture = grid([GridRow("p", [images(RED), images(BLUE)])])
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"


def test_saved_images_are_loaded_in_any_memory_format(tmp_path):
    shown = images(RED, BLUE).to(memory_format=torch.channels_last)
    assert not shown.is_contiguous()
    save_images(tmp_path / "deep" / "base.safetensors", shown)
    assert torch.equal(load_images(tmp_path / "deep" / "base.safetensors"), shown)
    assert load_images(tmp_path / "none.safetensors") is None


def test_condition_images_are_below_the_label():
    green, cyan = (0.0, 1.0, 0.0), (0.0, 1.0, 1.0)
    blocks = [images(RED), images(BLUE)]
    conditions = [Image.new("RGB", (400, 200), "#00ff00"), Image.new("L", (50, 900), 0)]
    with_them = grid(
        [GridRow("edit it", blocks, conditions=[*conditions, Image.new("RGB", (9, 9), "#00ffff")])]
    )
    left, top, right, bottom = box(with_them, green)
    assert abs((right - left) - 2 * (bottom - top)) <= 1
    assert right < box(with_them, RED)[0]
    # Small images are not enlarged, and are next to the others.
    small = box(with_them, cyan)
    assert (small[2] - small[0], small[3] - small[1]) == (9, 9)
    assert small[0] > right
    assert small[1] == top
    # Without conditions, all else stays in its place.
    plain = grid([GridRow("edit it", blocks)])
    assert box(plain, RED)[:2] == box(with_them, RED)[:2]
    assert with_them.width == plain.width


def test_an_animated_grid_plays_every_video_in_its_place():
    video = torch.zeros(1, 3, 3, 32, 32)
    for frame in range(3):
        video[0, frame, 0], video[0, frame, 1] = 1.0, (frame + 10) / 255
    rows = [GridRow("p", [video, video.flip(1)], [["✓"], ["0.5"]])]
    pictures = [*animate_grid(rows, ["base", "tuned"], title="t", subtitle="s")]
    assert len(pictures) == 3
    assert {p.size for p in pictures} == {pictures[0].size}
    assert all(n % 2 == 0 for n in pictures[0].size)
    places = []
    for frame, picture in enumerate(pictures):
        one, two = np.asarray(picture), (1.0, (12 - frame) / 255, 0.0)
        left = np.nonzero((one == [255, frame + 10, 0]).all(-1))[1].min()
        right = box(picture, two)[0] if frame != 1 else None
        places.append((left, right))
    assert places[0] == places[2]
    assert places[1][0] == places[0][0] < places[0][1]
    with pytest.raises(ValueError, match="only videos can be animated"):
        next(animate_grid([GridRow("p", [images(RED)])], ["base"], title="t", subtitle="s"))


def test_a_script_without_a_font_is_said_and_a_font_of_one_s_own_is_used(tmp_path, monkeypatch):
    builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    text = "a \U000f1234"  # for private use, so that no font has it
    plain = grid([GridRow("a", [images(RED), images(BLUE)])])
    lacking = grid([GridRow(text, [images(RED), images(BLUE)])])
    assert grid_text.missing_glyphs(["a", text]) == "\U000f1234"
    assert lacking.height > plain.height  # a line more below the title
    names = {".notdef": None, "a": ord("a"), "space": ord(" "), "own": 0xF1234}
    pen = pens.TTGlyphPen(None)
    for x, y in ((100, 0), (100, 700), (900, 700), (900, 0)):
        (pen.lineTo if pen.points else pen.moveTo)((x, y))
    pen.closePath()
    box_glyph, blank = pen.glyph(), pens.TTGlyphPen(None).glyph()
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([*names])
    font.setupCharacterMap({c: n for n, c in names.items() if c})
    font.setupGlyf({n: box_glyph if n in ("a", "own") else blank for n in names})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupOS2()
    font.setupNameTable({"familyName": "Own", "styleName": "Regular"})
    font.setupPost()
    font.save(tmp_path / "own.ttf")
    monkeypatch.setenv("FLOWGRPO_FONT", str(tmp_path / "own.ttf"))
    for cached in (grid_text.font_for, grid_text._fonts):
        cached.cache_clear()
    try:
        assert grid_text.missing_glyphs([text]) == ""
    finally:
        for cached in (grid_text.font_for, grid_text._fonts):
            cached.cache_clear()


def test_damaged_images_of_the_base_model_are_found(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    assert load_images(file) is None
    images = torch.rand(2, 3, 4, 4)
    save_images(file, images)
    found = load_images(file)
    assert found is not None
    assert torch.equal(found, images)
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]
    whole = file.read_bytes()
    for broken, problem in [
        (whole[:-1] + bytes([whole[-1] ^ 1]), "its SHA-256 differs"),
        (whole[:-1], "incomplete metadata"),
        (b"", "header too small"),
    ]:
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=f"base model's images is damaged .*{problem}"):
            load_images(file)


class Strokes:
    """Notes what is drawn and pasted, and draws it; texts without their font, colours as they are."""

    def __init__(self, monkeypatch):
        self.texts, self.boxes, self.pasted, self.others = [], [], [], []
        draw, paste = ImageDraw.Draw, Image.Image.paste
        notes = self

        class Pen:
            def __init__(self, canvas):
                self.pen = draw(canvas)

            def text(self, at, text, fill, font):
                notes.texts.append((*at, text, fill))
                self.pen.text(at, text, fill=fill, font=font)

            def rectangle(self, box, fill=None, outline=None):
                notes.boxes.append((*box, fill or outline))
                self.pen.rectangle(box, fill=fill, outline=outline)

            def line(self, box, fill, width=0):
                notes.others.append(("line", *(round(v, 2) for v in box), fill, width))
                self.pen.line(box, fill=fill, width=width)

            def ellipse(self, box, fill):
                notes.others.append(("ellipse", *(round(v, 2) for v in box), fill))
                self.pen.ellipse(box, fill=fill)

        def pasting(canvas, picture, at=None, mask=None):
            notes.pasted.append((at, picture.size))
            paste(canvas, picture, at, mask)

        monkeypatch.setattr(grid_drawing.ImageDraw, "Draw", Pen)
        monkeypatch.setattr(Image.Image, "paste", pasting)


INK, SOFT, FAINT, PAPER = "#15171c", "#656b76", "#dfe2e7", "#ffffff"


def test_every_stroke_of_a_grid_is_in_its_place(monkeypatch):
    """Images of 96 pixels. Lines of text are 1.4 times their size: 31, 20, 21 and 18 pixels.

    The title begins at 32, the subtitle 4 below it, the columns' titles end 26 + 21 below that, and
    the first row begins 22 further down. Labels are 208 wide, 24 from the images.
    """
    grid_drawing._badge.cache_clear()
    strokes = Strokes(monkeypatch)
    pair = images(RED, BLUE, size=(96, 96))
    rows = [GridRow("one", [pair, pair], [["✓", "✗ why"], ["", "0.5"]]), GridRow("two", [pair, pair])]  # fmt: skip
    picture = draw_grid(rows, ["base", "tuned"], title="T", subtitle="S")
    grid_drawing._badge.cache_clear()
    assert picture.size == (724, 430)
    assert strokes.texts == [
        (32, 32, "T", INK), (32, 67, "S", SOFT), (264, 113, "base", INK), (494, 113, "tuned", INK),
        (32, 193, "one", INK), (366, 257, "why", SOFT), (596, 257, "0.5", SOFT), (32, 333, "two", INK),
    ]  # fmt: skip
    assert strokes.boxes == [
        (264, 139, 461, 141, "#9aa1ad"), (494, 139, 691, 141, "#3b6fe0"),
        *((x - 1, y - 1, x + 96, y + 96, FAINT) for y in (156, 296) for x in (264, 366, 494, 596)),
    ]  # fmt: skip
    assert strokes.pasted == [
        ((264, 156), (96, 96)), ((338, 230), (19, 19)), ((366, 156), (96, 96)), ((440, 230), (19, 19)),
        ((494, 156), (96, 96)), ((596, 156), (96, 96)),
        *(((x, 296), (96, 96)) for x in (264, 366, 494, 596)),
    ]  # fmt: skip

    # The badges, drawn at four times their size, with round ends of their strokes.
    def stroke(x0, y0, x1, y1):
        ends = [("ellipse", *(round(v, 2) for v in (x - 3.5, y - 3.5, x + 3.5, y + 3.5)), PAPER) for x, y in ((x0, y0), (x1, y1))]  # fmt: skip
        return [("line", x0, y0, x1, y1, PAPER, 7), *ends]

    disc = [("ellipse", 0, 0, 75, 75, PAPER)]
    tick = [*disc, ("ellipse", 6, 6, 69, 69, "#1a9c52"), *stroke(21.28, 39.52, 33.44, 50.92), *stroke(33.44, 50.92, 55.48, 27.36)]  # fmt: skip
    cross = [*disc, ("ellipse", 6, 6, 69, 69, "#d93a3a"), *stroke(25.84, 25.84, 50.16, 50.16), *stroke(25.84, 50.16, 50.16, 25.84)]  # fmt: skip
    rule = ("line", 32, 285, 692, 285, FAINT, 0)
    assert strokes.others == [*tick, *cross, rule]


def test_every_stroke_of_a_narrow_grid_and_of_videos_is_in_its_place(monkeypatch):
    strokes = Strokes(monkeypatch)
    pair = images(RED, BLUE, size=(96, 96))
    picture = draw_grid([GridRow("one", [pair, pair], [["", "0.5"], ["", ""]])] * 2, ["base", "tuned"], title="T", subtitle="S", narrow=True)  # fmt: skip
    # Head 109; of each row a label of 21, and two blocks of 28 + 96 + 22.
    assert picture.size == (262, 109 + 2 * (21 + 2 * 146 + 22) + 16)
    assert strokes.texts == [(32, 32, "T", INK), (32, 67, "S", SOFT)] + [
        text
        for top in (109, 444)
        for text in [
            (32, top, "one", INK), (32, top + 27, "base", SOFT), (32, top + 173, "tuned", SOFT),
            (134, top + 49 + 101, "0.5", SOFT),
        ]
    ]  # fmt: skip
    assert strokes.pasted == [((x, top), (96, 96)) for top in (158, 304, 493, 639) for x in (32, 134)]  # fmt: skip
    # Frames 2 apart, videos 16, blocks 32; a picture of three frames is 292 wide.
    strokes.pasted.clear()
    video = torch.rand(2, 5, 3, 96, 48)
    picture = draw_grid([GridRow("p", [video, video])], ["a", "b"], title="T", subtitle="S")
    places = [264 + block * (2 * 148 + 16 + 32) + sample * 164 + 50 * frame for block in (0, 1) for sample in (0, 1) for frame in (0, 1, 2)]  # fmt: skip
    assert strokes.pasted == [((x, 156), (48, 96)) for x in places]
    assert picture.width == 264 + 2 * 344 - 32 + 32
    # Small blocks leave room for their titles.
    narrow = images(RED, size=(96, 8))
    assert draw_grid([GridRow("p", [narrow] * 2)], ["a", "b"], title="T", subtitle="S").width == 264 + 2 * 164  # fmt: skip


def test_conditions_are_below_the_label_in_the_middle_of_the_row(monkeypatch):
    strokes = Strokes(monkeypatch)
    tall, wide, fourth = Image.new("RGB", (90, 180)), Image.new("RGB", (240, 80)), Image.new("RGB", (9, 9))  # fmt: skip
    for pictures, sizes in (
        ([tall], [(36, 72)]),
        ([wide], [(101, 34)]),
        ([wide, tall], [(101, 34), (36, 72)]),
        ([wide, wide, tall, fourth], [(65, 22), (65, 22), (36, 72)]),
    ):
        strokes.pasted.clear(), strokes.boxes.clear(), strokes.texts.clear()
        media = images(RED, size=(200, 200))
        picture = draw_grid([GridRow("p", [media], conditions=pictures)], ["a"], title="T", subtitle="S")  # fmt: skip
        strip = max(h for _, h in sizes) + 8
        top = 156 + (200 - 21 - strip) // 2
        assert strokes.texts[3][:3] == (32, top, "p")
        lefts = [32 + sum(w + 6 for w, _ in sizes[:n]) for n in range(len(sizes))]
        assert strokes.pasted[:-1] == [((x, top + 29), size) for x, size in zip(lefts, sizes, strict=True)]  # fmt: skip
        assert strokes.boxes[1 : 1 + len(sizes)] == [(x - 1, top + 28, x + w, top + 29 + h, FAINT) for x, (w, h) in zip(lefts, sizes, strict=True)]  # fmt: skip
        assert picture.height == 156 + 200 + 22 + 16
    # A label with a picture that is higher than the images makes the row higher.
    media = images(RED, size=(96, 96))
    tall = draw_grid([GridRow("p", [media], conditions=[tall])], ["a"], title="T", subtitle="S")
    assert tall.height == 156 + 21 + 72 + 8 + 22 + 16
    narrow = draw_grid([GridRow("p", [media], conditions=[wide])], ["a"], title="T", subtitle="S", narrow=True)  # fmt: skip
    assert narrow.height == 109 + 21 + 42 + 28 + 96 + 22 + 16


def test_texts_are_cut_after_as_many_lines_as_there_is_room_for(monkeypatch):
    strokes = Strokes(monkeypatch)
    words = " ".join(["wordy"] * 400)
    for height, narrow, expected in ((96, False, 6), (250, False, 11), (250, True, 6)):
        strokes.texts.clear()
        media = images(RED, size=(height, height))
        draw_grid([GridRow(words, [media])], [words], title=words, subtitle=words, narrow=narrow)
        columns = 1 if narrow else 2
        counts = [3, 4, expected, 1] if narrow else [3, 4, columns, expected]
        assert len(strokes.texts) == sum(counts)
        ends = [i for i, text in enumerate(strokes.texts) if text[2].endswith("…")]
        assert [i + 1 for i in ends] == [sum(counts[: n + 1]) for n in range(4)]

    class Fixed(ImageFont.ImageFont):
        """A font all of whose characters are 10 pixels wide."""

        def getlength(self, text, *args, **kwargs):
            return 10 * len(text)

    def wrap(text, width, most=9):
        return grid_text.wrap(text, Fixed(), width, most)

    assert wrap("ab cd ef", 50) == ["ab cd", "ef"]
    assert wrap("ab cd ef", 49) == ["ab", "cd", "ef"]
    assert wrap("abcdef gh", 30) == ["abc", "def", "gh"]
    assert wrap("a bcdefg h", 30) == ["a", "bcd", "efg", "h"]
    assert wrap("abcdef g", 40) == ["abcd", "ef g"]
    assert wrap("a b c d", 10, 2) == ["a", "…"]
    assert wrap("ab cd ef gh", 50, 1) == ["ab c…"]
    assert wrap("abc def", 40, 1) == ["abc…"]
    assert wrap("abc def", 30, 2) == ["abc", "def"]
    assert wrap("abcd efg", 40, 1) == ["abc…"]
    assert wrap("", 40) == [""]
