"""Each requirement of the specifications has a test that exists, or a decision that says why it has none."""

from pathlib import Path

import pytest

from tests.support import requirements
from tests.support.requirements import Requirement, guides, missing, named_in, problems

PACKS = list(guides())
GUIDE = """# A guide

| id | requirement | shown by |
|---|---|---|
"""
SPECIFICATION = """
### Requirement: Store tokens

#### Scenario: Token table

It mitigates SEC-001.
"""
TASKS = """
## Acceptance Criteria

1. A schema
   1. nested
2. Sample data

---

- [x] **Task 2a: Tables** (AC: 2)
  - [x] Create one
    - [x] Create its columns
"""
HEADINGS = """
# Schema
## Overview
## Tables
### users
#### columns
### posts
## Frontend
[[ Not relevant ]]
## Changelog
"""


def table(tmp_path: Path, *rows: str) -> list[Requirement]:
    """The requirements of a guide with these rows."""
    guide = tmp_path / "README.md"
    guide.write_text("\n".join([GUIDE.strip(), *rows, "", "| no | requirement | `test_of_nothing` |"]))
    return list(requirements.requirements(guide))


@pytest.mark.parametrize("pack", PACKS)
def test_each_requirement_of_a_pack_has_a_test_or_a_decision(pack: str) -> None:
    assert [] == list(problems(pack, list(requirements.requirements(guides()[pack]))))


@pytest.mark.parametrize("pack", PACKS)
def test_each_test_that_the_guide_of_a_pack_names_exists(pack: str) -> None:
    named = requirements.CITED.findall(guides()[pack].read_text(encoding="utf-8"))
    assert [] == [name for name in named if requirements.place_of(name, pack) is None]


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        ("", "neither a test nor a decision"),
        ("the guide", "neither a test nor a decision"),
        ("`test_of_nothing_at_all`", "test_of_nothing_at_all is no test, or several"),
        ("`test_a_required_column_refuses_null`", "test_a_required_column_refuses_null is no test, or several"),
        ("[0999](../decisions/0999-none.md)", "../decisions/0999-none.md does not exist"),
    ],
)
def test_a_requirement_that_nothing_shows_is_named(tmp_path: Path, shown: str, problem: str) -> None:
    found = table(tmp_path, f"| Scenario: Token table, AC 1 | tokens | {shown} |")
    assert [f"app: {id_}: {problem}" for id_ in ("Scenario: Token table", "AC 1")] == list(problems("app", found))


def test_a_requirement_is_shown_with_the_places_of_its_tests_and_its_decisions(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "0001-why.md").touch()
    [one] = table(
        tmp_path,
        "| AC 1 | keys | `test_requirements.py::test_an_id_has_one_row` ([0001](decisions/0001-why.md)) |",
    )
    assert [] == list(problems("app", [one]))
    assert "AC 1: keys: tests/unit/test_requirements.py::test_an_id_has_one_row, decision 0001" == str(one)


def test_an_id_has_one_row(tmp_path: Path) -> None:
    row = "| AC 1 | keys | `test_an_id_has_one_row` |"
    assert ["app: AC 1: has 2 rows"] == list(problems("app", table(tmp_path, row, row)))


def test_a_test_of_the_pack_comes_before_one_of_all_packs_and_before_others() -> None:
    own, every = (requirements.place_of("test_a_required_column_refuses_null", pack) for pack in (PACKS[0], "app"))
    assert f"tests/packs/test_{PACKS[0]}.py::test_a_required_column_refuses_null" == own
    assert every is None
    assert requirements.place_of("test_up_down_and_up_again_leaves_the_same_catalog", "app") == (
        "tests/packs/test_every_pack.py::test_up_down_and_up_again_leaves_the_same_catalog"
    )


@pytest.mark.parametrize(
    ("specification", "named"),
    [
        (SPECIFICATION, ["SEC-001", "Requirement: Store tokens", "Scenario: Token table"]),
        (TASKS, ["AC 1", "AC 2", "Task 2a.1", "Task 2a.2"]),
        (HEADINGS, ["Overview", "columns", "posts"]),
    ],
)
def test_what_a_specification_names_is_compared_with_the_table(
    tmp_path: Path, specification: str, named: list[str]
) -> None:
    assert named == named_in(specification)
    assert named == missing(specification, [])
    found = table(tmp_path, *(f"| {name} | as specified | `test_an_id_has_one_row` |" for name in named[1:]))
    assert named[:1] == missing(specification, found)


def test_a_row_for_a_part_of_a_section_stands_for_the_section(tmp_path: Path) -> None:
    found = table(tmp_path, "| posts: keys, columns: types, Overview | ... | `test_an_id_has_one_row` |")
    assert [] == missing(HEADINGS, found)


def test_the_list_of_all_requirements_ends_with_totals_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path, "| AC 1 | keys | `test_an_id_has_one_row` |")
    monkeypatch.setattr(requirements, "guides", lambda: {"app": tmp_path / "README.md"})
    assert 0 == requirements.main(None)
    output, errors = capsys.readouterr()
    assert [
        "app: AC 1: keys: tests/unit/test_requirements.py::test_an_id_has_one_row",
        "app: requirements: 1, with a test: 1, only with a decision: 0, tests: 1",
    ] == output.splitlines()
    assert "" == errors
    (tmp_path / "app.md").write_text(TASKS)
    assert 1 == requirements.main(tmp_path)
    assert [f"app: {name}: the table has no row for it" for name in ("AC 2", "Task 2a.1", "Task 2a.2")] == (
        capsys.readouterr().err.splitlines()
    )
