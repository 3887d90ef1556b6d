"""Writes the generated prompt files: ``python -m scripts.prompt_sets --out prompts``."""

import argparse
from pathlib import Path

from scripts.prompt_sets import generated_files


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(prog="python -m scripts.prompt_sets", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the files to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in generated_files().items():
        text = "".join(f"{line}\n" for line in lines)
        (out / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{out / name}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
