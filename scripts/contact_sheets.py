"""Draws pictures of the embedded model, and numbered contact sheets for labelling them.

    python -m scripts.contact_sheets --run runs/quickstart --out labels

Half of the pictures are the base model's and half those of the run; a third of each is drawn with
guidance 3. Their order is random and the sheets show number and prompt alone, so that whoever labels a
picture knows neither its model nor the verifier's verdict. ``labels.json`` is written with ``"right":
null`` for every picture, to be replaced by true or false. The stored pictures have 6 bits per channel,
and the sheets show these.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowgrpo.cli.common import load_run, quiet
from flowgrpo.config import find
from flowgrpo.data import strict_json
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation.held_out import noise_for, plan
from flowgrpo.policy import PipelinePolicy, Sampling

BITS = 6
COLUMNS, ROWS, SIDE, CAPTION = 6, 5, 192, 22
ATLAS_COLUMNS = 20
SEED = 101
"""Not a seed of the quick start, whose evaluations have other noise."""


def main() -> None:
    """Draw the pictures, the atlas, the sheets and the empty labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--weights", default="last")
    parser.add_argument("--images", type=int, default=360)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    third = options.images // 6
    parts = [
        (model, guidance, number, SEED + index)
        for index, model in enumerate(("base", "trained"))
        for guidance, number in ((1.0, 2 * third), (3.0, third))
    ]
    policies = {
        "base": PipelinePolicy.from_pretrained("shapes", sampling=Sampling(), batch_size=120),
        "trained": load_run(options.run, options.weights)[0],
    }
    found = []
    for model, guidance, number, seed in parts:
        found += _drawn(policies[model], model, guidance, number, seed)
    random.Random(SEED).shuffle(found)
    options.out.mkdir(parents=True, exist_ok=True)
    _save_atlas([picture for picture, _ in found], options.out / "pictures.webp")
    rows = [about | {"right": None} for _, about in found]
    lines = ",\n".join(strict_json.dumps(row) for row in rows)
    (options.out / "labels.json").write_text(f"[\n{lines}\n]\n")
    page = COLUMNS * ROWS
    for start in range(0, len(found), page):
        sheet = _sheet(start, [(p, a["prompt"]) for p, a in found[start : start + page]])
        sheet.save(options.out / f"sheet_{start // page:02d}.png")


def _drawn(
    policy: PipelinePolicy, model: str, guidance: float, number: int, seed: int
) -> list[tuple[np.ndarray, dict]]:
    """Pictures ``(64, 64, 3)`` of held-out prompts, with what is known about each."""
    items = plan(PromptSet.load(find("prompts/shapes_held_out.jsonl"), "tag"), number)
    sampling = Sampling(num_steps=8, guidance_scale=guidance)
    found = []
    for rollout in policy.run([i.prompt for i in items], noise_for(items, seed), sampling=sampling):
        levels = (rollout.media.clamp(0, 1) * (2**BITS - 1)).round() / (2**BITS - 1)
        pictures = (levels * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for item, picture in zip(
            items[rollout.rows.start : rollout.rows.stop], pictures, strict=True
        ):
            about = {"prompt": item.prompt.text, "model": model, "guidance": guidance}
            found.append((picture, about | {"seed": seed, "index": item.index}))
    return found


def _save_atlas(pictures: list[np.ndarray], path: Path) -> None:
    rows = -(-len(pictures) // ATLAS_COLUMNS)
    atlas = Image.new("RGB", (64 * ATLAS_COLUMNS, 64 * rows))
    for index, picture in enumerate(pictures):
        place = (64 * (index % ATLAS_COLUMNS), 64 * (index // ATLAS_COLUMNS))
        atlas.paste(Image.fromarray(picture), place)
    atlas.save(path, lossless=True, quality=100, method=6)


def _sheet(first: int, pictures: list[tuple[np.ndarray, str]]) -> Image.Image:
    height = SIDE + CAPTION
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 6), ROWS * (height + 6)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for index, (picture, prompt) in enumerate(pictures):
        x, y = (index % COLUMNS) * (SIDE + 6), (index // COLUMNS) * (height + 6)
        large = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(large, (x, y + CAPTION))
        words = prompt.removeprefix("a photo of ")
        pen.text((x + 2, y + 4), f"{first + index}: {words}", fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
