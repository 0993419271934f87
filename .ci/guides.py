"""The files of the site that `make docs` builds: every guide of the repository, under its own path.

mkdocs reads one folder. The guides are in several, and link to one another by relative paths, as GitHub shows them.
This hook gives mkdocs all of them, with the repository as the root; mkdocs then resolves the links and checks them.

Diagrams are drawn if `npm install` was run in tests/guides; otherwise their source is shown.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from pymdownx.superfences import fence_code_format  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "*.md",
    "LICENSE",
    ".github/*",
    "docs/**/*",
    "clients/*/README.md",
    "examples/*/*",
    "bench/RESULTS.md",
    "bench/charts/*",
)
MERMAID = ROOT / "tests/guides/node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js"
SCRIPT = "assets/mermaid.js"


def on_config(config: MkDocsConfig) -> None:
    """Have diagrams drawn. Without the library, the theme would load one from elsewhere."""
    if MERMAID.exists():
        fence = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
        config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme, and the guides. Asterisks in the navigation become the names that they stand for."""
    names = [path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in _matching(pattern)]
    config.nav = _expanded(config.nav)
    theirs = [file for file in files if file.src_dir != config.docs_dir]
    scripts = [File.generated(config, SCRIPT, abs_src_path=str(MERMAID))] if MERMAID.exists() else []
    return Files(theirs + scripts + [_file(name, config) for name in names])


def on_page_markdown(markdown: str, **_: object) -> str:
    """The guide in the dialect of mkdocs: a blank line before each list, and four spaces within a numbered item."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    for place in range(0, len(parts), 2):  # the others are code
        parts[place] = re.sub(r"^(?![ -]|\d+\. )(.+\n)(?=- |\d+\. )", r"\1\n", parts[place], flags=re.MULTILINE)
        parts[place] = re.sub(r"^ {3}(?=\S)", " " * 4, parts[place], flags=re.MULTILINE)
    return "".join(parts)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """The page with the library that draws its diagrams, if it has any."""
    script = f'<script src="{get_relative_url(SCRIPT, page.url)}"></script>'
    return f"{html}{script}" if 'class="mermaid"' in html else html


def _matching(pattern: str) -> list[Path]:
    return [path for path in sorted(ROOT.glob(pattern)) if path.is_file()]


def _expanded(nav: Any) -> Any:  # noqa: ANN401 - lists, mappings and strings, as YAML has them
    match nav:
        case list():
            items = [_matching(item) if isinstance(item, str) else [item] for item in nav]
            return [_expanded(item) for found in items for item in found]
        case dict():
            return {title: _expanded(item) for title, item in nav.items()}
        case Path():
            return nav.relative_to(ROOT).as_posix()
    return nav


def _file(name: str, config: MkDocsConfig) -> File:
    """A file, whose address leaves out `docs/`."""
    file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file
