"""Compare the recipes with the published settings, and write the result into their headers and a page.

``configs/published/values.toml`` holds for each recipe the published value of every key that a source
names, the reason where the recipe has another value, and differences that no key expresses.

    python -m scripts.recipe_table docs/recipes.md
"""

import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.config import load
from flowgrpo.config.evidence import LEVELS, evidence
from flowgrpo.config.files import find
from flowgrpo.config.reference import to_table
from scripts.page_tables import markdown_table, write_marked_text

MARKER = "recipes"
CONFIGS = find("quickstart").parent
WIDTH = 104


@dataclass(frozen=True)
class Recipe:
    """A recipe beside what was published.

    Attributes:
        name: Name of its file in ``configs``.
        method: The method and its paper.
        source: The files that the published values come from.
        notes: Differences that no key expresses.
        published: Published values by dotted key.
        why: The reason for each key where the recipe differs.
        here: The recipe's own values of the same keys.
    """

    name: str
    method: str
    source: str
    notes: Sequence[str]
    published: Mapping[str, Any]
    why: Mapping[str, str]
    here: Mapping[str, Any]

    @property
    def different(self) -> list[str]:
        """The keys whose values are not the published ones."""
        return [key for key, value in self.published.items() if self.here[key] != value]


def recipes() -> list[Recipe]:
    """All recipes that have published values, in the order of the file."""
    found = tomllib.loads((CONFIGS / "published" / "values.toml").read_text())
    result = []
    for name, entry in found.items():
        table = to_table(load(name))
        here = {key: value_at(table, key) for key in entry["published"]}
        result.append(Recipe(name=name, why=entry.pop("why", {}), here=here, **entry))
    return result


def value_at(table: Any, key: str) -> Any:
    """The value at a dotted key of a configuration; None where there is none. Lists are indexed."""
    for part in key.split("."):
        if isinstance(table, Mapping):
            table = table.get(part)
        elif isinstance(table, Sequence) and part.isdigit():
            table = table[int(part)] if int(part) < len(table) else None
        else:
            return None
    return list(table) if isinstance(table, tuple) else table


def header(recipe: Recipe) -> str:
    """The comment that a recipe's file has below its description."""
    equal = [key for key in recipe.published if key not in recipe.different]
    values = "; ".join(f"{key} = {_shown(recipe.here[key])}" for key in equal)
    lines = [f"As published ({recipe.source}): {values}.", "Differs from it:"]
    lines += [
        f"- {key} = {_shown(recipe.here[key])}, published {_shown(recipe.published[key])}: {recipe.why[key]}"
        for key in recipe.different
    ]
    lines += [f"- {note}" for note in recipe.notes]
    wrapped = [
        textwrap.fill(
            line,
            WIDTH,
            initial_indent="# ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    ]
    return "\n".join(wrapped)


def with_header(text: str, recipe: Recipe) -> str:
    """The recipe's file with its description kept and the comment below it written anew."""
    comment, body = text.split("\n\n", 1)
    description = comment.split("\n# As published (")[0]
    return f"{description}\n{header(recipe)}\n\n{body}"


def table() -> str:
    """All recipes in Markdown, with the values that differ from the published ones."""
    rows = []
    for recipe in recipes():
        differences = [
            f"`{key}` {_shown(recipe.here[key])}, published {_shown(recipe.published[key])}: {recipe.why[key]}"
            for key in recipe.different
        ]
        cells = (
            f"`{recipe.name}`",
            recipe.method,
            recipe.source,
            str(len(recipe.published) - len(recipe.different)),
            "<br>".join([*differences, *recipe.notes]),
            LEVELS[evidence(recipe.name)],
        )
        rows.append(cells)
    heads = ("recipe", "method", "source", "equal keys", "differences", "evidence")
    return markdown_table(heads, rows)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value).replace("'", '"') if isinstance(value, str | list) else str(value)


def main(page: Path) -> None:
    """Write the headers of all recipes and the table of the page."""
    for recipe in recipes():
        file = CONFIGS / f"{recipe.name}.toml"
        file.write_text(with_header(file.read_text(), recipe))
    write_marked_text(page, MARKER, table())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.recipe_table docs/recipes.md")
    main(Path(sys.argv[1]))
