"""A second world: other colours, words and sizes, drawn, described and judged by the code of the first.

Nothing of the study is tuned on it. It has a model of its own, which is trained further from the embedded
one and is not part of the repository:

    python -m scripts.pretrain_shapes --world benchmarks.study.second_world:WORLD \\
        --pipeline flowgrpo/shapes/model --autoencoder-steps 800 --autoencoder-lr 1e-3 \\
        --denoiser-steps 2000 --denoiser-lr 6e-4 --scenes 20000 --caption-noise 0.15 --out FOLDER/second_world

It takes about 35 minutes on a core. With FOLDER as its ``--folder`` the study also trains in this world.
"""

from pathlib import Path

from flowgrpo.data import strict_json
from flowgrpo.shapes import rewards
from flowgrpo.shapes.world import World
from scripts.prompt_sets.shapes import held_out_records, train_records

WORLD = World(
    colors={
        "pink": (243, 120, 190),
        "brown": (126, 74, 34),
        "black": (32, 32, 36),
        "teal": (20, 168, 176),
        "lime": (158, 208, 36),
        "navy": (34, 44, 124),
    },
    radius=(7.0, 11.0),
    caption="a drawing with {}",
    conjunction="next to",
    relations={
        "left of": "to the left of",
        "right of": "to the right of",
        "above": "over",
        "below": "under",
    },
)


def write_prompts(folder: Path) -> tuple[Path, Path]:
    """Write the training and the held-out prompts as files, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "second_train.jsonl", folder / "second_held_out.jsonl"
    for file, records in ((train, train_records(WORLD)), (held_out, held_out_records(WORLD))):
        file.write_text("".join(strict_json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return train, held_out


REWARDS = (
    "rewards=[{name='strict', model='benchmarks.study.second_world:Strict', weight=0.25}, "
    "{name='graded', model='benchmarks.study.second_world:Graded', weight=0.75}]"
)
"""The rewards of the first world, as settings of a run in the second."""


class Strict(rewards.Strict):
    """GenEval's rule in the second world."""

    def __init__(self) -> None:
        super().__init__(WORLD)


class Graded(rewards.Graded):
    """Partial credit in the second world."""

    def __init__(self) -> None:
        super().__init__(WORLD)
