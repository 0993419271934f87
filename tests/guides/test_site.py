"""The guides are one site, which needs nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.guide import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site. Its build fails where a link or an entry of the navigation leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    return folder


def test_every_guide_is_a_page_that_the_search_finds(site: Path) -> None:
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    for guide in ("", "protocol/", "getting-started/", "packs/chatgenius/", "decisions/0001-", "clients/python/"):
        assert f'"location":"{guide}' in index, guide


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in site.rglob("*.html")]
    loaded = (
        r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?([^" >]+)|<link\b(?=[^>]*stylesheet)[^>]*\bhref="?([^" >]+)'
    )
    places = {place for page in pages for found in re.findall(loaded, page) for place in found if place}
    assert len(places) > 2
    assert [] == [place for place in places if re.match(r"(https?:)?//", place)]


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    for name in ("mkdocs.yml", ".ci/guides.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8").partition("\nnav:")[0])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("# A\n\n[b](../b.md) [b](../b.md#part) [c](../c.md)\n")
    (tmp_path / "b.md").write_text("# B\n")
    command = [sys.executable, "-m", "mkdocs", "build"]
    done = subprocess.run(command, cwd=tmp_path, env={"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert 1 == done.returncode
    assert ["'../b.md#part'", "'../c.md'"] == sorted(re.findall(r"WARNING .* link ('.*?')", done.stderr))
