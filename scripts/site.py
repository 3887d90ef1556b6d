"""Hooks of the documentation site (``mkdocs.yml``): API pages, pages outside ``docs/``, links to them.

The pages are written to be read in the repository, where they link to files outside ``docs/``. The
site has those that are Markdown as pages of their own; a link to any other file becomes its text.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PROJECT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "performance.md",
    "prompts/README.md": "prompt_files.md",
    "scripts/README.md": "scripts.md",
}
"""Markdown files outside ``docs/`` and their pages. ``docs/README.md`` is the repository's index of
the documentation; the site has its navigation instead."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):(?=<code>)")


def packages() -> Iterator[tuple[str, str]]:
    """The import name of each package with an API page, and the first line of its docstring."""
    for folder in sorted([*ROOT.glob("flowgrpo/*"), ROOT / "reward_models"]):
        if (folder / "__init__.py").exists() and folder.name != "cli":
            docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
            yield ".".join(folder.relative_to(ROOT).parts), (docstring or "").split("\n")[0]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    assert config.nav is not None
    api = [{name: f"api/{name}.md"} for name, _ in [("flowgrpo", ""), *packages()]]
    pages = [page for page in PROJECT.values() if page != "index.md"]
    config.nav += [{"Python API": api}, {"Project": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generate the pages of the Python API, and those of the Markdown files outside ``docs/``."""
    rows = [f"| [{name}]({name}.md) | {line} |" for name, line in packages()]
    front = ["::: flowgrpo", "    options: {show_submodules: false, members: false}", ""]
    table = ["| package | contents |", "|---|---|", *rows]
    pages = {f"api/{name}.md": f"::: {name}\n" for name, _ in packages()}
    pages["api/flowgrpo.md"] = "\n".join([*front, *table])
    pages |= {page: (ROOT / source).read_text("utf-8") for source, page in PROJECT.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of ``docs/`` into links to the site's pages, or into their text."""
    here = page.file.src_uri
    source = {v: k for k, v in PROJECT.items()}.get(here, f"docs/{here}")

    def replaced(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        file = (ROOT / source).parent / path
        uri = site_page(file.resolve())
        return f"{mark}[{text}]({uri}{'#' * bool(anchor)}{anchor})" if uri else text

    return markdown if here.startswith("api/") else LINK.sub(replaced, markdown)


def site_page(file: Path) -> str:
    """The page or picture of the site that shows a file of the repository; empty if none does."""
    if file in (ROOT / "docs", ROOT / "docs" / "README.md"):
        return PROJECT["README.md"]
    if file.is_relative_to(ROOT / "docs"):
        shown = file.is_file() and file.suffix != ".py"
        return file.relative_to(ROOT / "docs").as_posix() if shown else ""
    return PROJECT.get(file.relative_to(ROOT).as_posix(), "")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show ``:class:`` and its kin, by which docstrings mark names, as code."""
    return ROLE.sub("", html)
