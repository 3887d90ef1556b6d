"""Generators of the prompt files in ``prompts/``, which ``prompts/README.md`` describes.

``python -m scripts.prompt_sets --out prompts`` writes the files.
"""

from flowgrpo.data import strict_json
from scripts.prompt_sets import geneval, shapes, text_rendering

TEXT_RENDERING_SEED = 7
TEXT_RENDERING_TRAIN, TEXT_RENDERING_HELD_OUT = 1000, 200


def generated_files() -> dict[str, list[str]]:
    """The lines of every generated file, by file name."""
    # The prompts of one call quote different texts, so the two files have no text in common.
    quoted = text_rendering.records(
        TEXT_RENDERING_TRAIN + TEXT_RENDERING_HELD_OUT, TEXT_RENDERING_SEED
    )
    records = {
        "text_rendering_train.jsonl": quoted[:TEXT_RENDERING_TRAIN],
        "text_rendering_held_out.jsonl": quoted[TEXT_RENDERING_TRAIN:],
        "geneval_train.jsonl": geneval.train_records(),
        "shapes_train.jsonl": shapes.train_records(),
        "shapes_held_out.jsonl": shapes.held_out_records(),
    }
    files = {name: [strict_json.dumps(r) for r in rows] for name, rows in records.items()}
    return {"geneval.jsonl": geneval.lines(), **files}
