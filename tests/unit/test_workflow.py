"""CI covers the supported versions, and sets only variables that exist."""

import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
JOBS = re.findall(r'^ +- \{ python: "3\.(\d+)", postgres: "(\d+)" \}$', WORKFLOW, re.MULTILINE)
PYTHONS = sorted({int(python) for python, _ in JOBS})  # the minor versions of Python 3
POSTGRES = sorted({int(postgres) for _, postgres in JOBS})


def number(pattern: str, *path: str) -> int:
    """The number in the first match of the pattern in a file."""
    found = re.search(pattern, ROOT.joinpath(*path).read_text(encoding="utf-8"))
    assert found, f"{'/'.join(path)} has nothing like {pattern}"
    return int(found[1])


def test_the_oldest_versions_are_the_oldest_supported_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f">=3.{PYTHONS[0]}" == project["requires-python"]
    assert PYTHONS[0] == number(r"Python 3\.(\d+) or newer", "docs", "operate.md")
    assert POSTGRES[0] == number(r"PostgreSQL (\d+) or newer", "docs", "operate.md")
    assert POSTGRES[0] == number(r'pg_version = "(\d+)"', ".squawk.toml")


def test_every_version_from_the_oldest_to_the_newest_is_covered() -> None:
    assert list(range(PYTHONS[0], PYTHONS[-1] + 1)) == PYTHONS
    assert list(range(POSTGRES[0], POSTGRES[-1] + 1)) == POSTGRES


def test_each_postgres_runs_with_the_oldest_python_and_each_python_with_the_newest_postgres() -> None:
    expected = {(PYTHONS[0], postgres) for postgres in POSTGRES} | {(python, POSTGRES[-1]) for python in PYTHONS}
    assert sorted(expected) == sorted((int(python), int(postgres)) for python, postgres in JOBS)


def test_the_whole_history_is_scanned_for_secrets() -> None:
    scan = (ROOT / ".github" / "workflows" / "secret-scan.yml").read_text(encoding="utf-8")
    assert "- run: make secrets SECRETS_ARGS=--all\n" in scan
    assert "\nsecrets: $(READY)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    for workflow in (WORKFLOW, scan):
        assert workflow.count("uses: actions/checkout@") == workflow.count("fetch-depth: 0") == 1


def test_the_script_and_the_variables_of_the_workflow_exist() -> None:
    script = ROOT / ".ci" / "run"
    assert "run: .ci/run\n" in WORKFLOW
    assert os.access(script, os.X_OK)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)$", script.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"check", "test"} == targets & set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    readers = {"PYTHON": makefile, "ROWCAST_TEST_PG": (ROOT / "tests" / "support" / "postgres.py").read_text("utf-8")}
    for variable, reader in readers.items():
        assert f" {variable}: ${{{{ " in WORKFLOW
        assert variable in reader
