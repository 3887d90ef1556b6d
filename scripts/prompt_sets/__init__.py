"""The prompt files that the library ships, and what generates them.

``python -m scripts.prompt_sets --out prompts`` writes them; ``prompts/README.md`` describes them.
"""

import json

from scripts.prompt_sets import geneval, shapes, text_rendering

TEXT_RENDERING_SEED = 7
TEXT_RENDERING_TRAIN, TEXT_RENDERING_HELD_OUT = 1000, 200


def generated_files() -> dict[str, list[str]]:
    """The lines of every generated file, by its name."""
    # No two prompts of one call quote the same text, so the two files share none.
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
    files = {name: [json.dumps(r) for r in rows] for name, rows in records.items()}
    return {"geneval.jsonl": geneval.lines(), **files}
