"""Generates training and held-out prompts of the six tasks, of the embedded world or another."""

from itertools import zip_longest
from zlib import crc32

from flowgrpo.shapes.captions import TASKS, Record, split
from flowgrpo.shapes.world import WORLD, World

MAX_TRAIN_PER_TASK = 120
MAX_HELD_OUT_PER_TASK = 20


def train_records(world: World = WORLD) -> list[Record]:
    """The training prompts, task by task. Tasks differ in size."""
    return [
        record
        for task in TASKS
        for record in _some(split(task, False, world=world), MAX_TRAIN_PER_TASK)
    ]


def held_out_records(world: World = WORLD) -> list[Record]:
    """The held-out prompts, from each task in turn, so that prefixes are balanced."""
    tasks = [_some(split(task, True, world=world), MAX_HELD_OUT_PER_TASK) for task in TASKS]
    return [record for turn in zip_longest(*tasks) for record in turn if record is not None]


def _some(records: list[Record], limit: int) -> list[Record]:
    """At most ``limit`` of the records, chosen and ordered by a hash of the prompt."""
    return sorted(records, key=lambda record: crc32(record["prompt"].encode()))[:limit]
