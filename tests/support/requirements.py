"""What the specifications require, and the tests that show it: the tables at the end of the packs' guides.

`python -m tests.support.requirements` prints each requirement with its tests on one line. It fails if a requirement
has neither a test nor a decision, or names a test or a decision that does not exist. With a folder of specifications
as its argument, `<pack>.md` each, it also fails if a specification names something that the table does not.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = "| id | requirement | shown by |"
ID = r"(?:US|SEC|OPS|DATA|TECH|PERF)-\d{3}"  # of stories and risks
CITED = re.compile(r"`((?:test_\w+\.py::)?test_\w+)`")
NO_REQUIREMENTS = ("Basic Information", "User Stories & Acceptance Criteria", "Changelog")  # or with ids of their own


@dataclass(frozen=True)
class Requirement:
    """A requirement under the name that its specification gives it. `places` are pytest ids, `decisions` files."""

    id: str
    text: str
    places: tuple[str, ...]
    decisions: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        links = [f"decision {Path(file).name[:4]}" for file in self.decisions]
        return f"{self.id}: {self.text}: {', '.join([*self.places, *links])}"


def guides() -> dict[str, Path]:
    """The guide of each pack."""
    return {guide.parent.name: guide for guide in sorted(ROOT.glob("docs/packs/*/README.md"))}


@cache
def files_of_tests() -> dict[str, list[str]]:
    """The files that define each test."""
    found = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found[node.name].append(path.relative_to(ROOT).as_posix())
    return found


def place_of(cited: str, pack: str) -> str | None:
    """The pytest id of a test, cited by its name or as `file.py::name`; None unless exactly one is meant.

    A name means the test of the pack's own file, else that of all packs, else the only one.
    """
    file, _, name = cited.rpartition("::")
    there = [path for path in files_of_tests().get(name, []) if not file or Path(path).name == file]
    for own in (f"tests/packs/test_{pack}.py", "tests/packs/test_every_pack.py"):
        if own in there:
            return f"{own}::{name}"
    return f"{there[0]}::{name}" if len(there) == 1 else None


def requirements(guide: Path) -> Iterator[Requirement]:
    """The rows of the guide's table, one for each id."""
    _, header, after = guide.read_text(encoding="utf-8").partition(f"\n{HEADER}\n")
    assert header, f"{guide} has no table with the header {HEADER}"
    table, _, _ = after.partition("\n\n")
    for row in table.splitlines()[1:]:
        _, ids, text, shown, _ = (cell.strip() for cell in row.split("|"))
        cited = list(dict.fromkeys(CITED.findall(shown)))
        places = {name: place_of(name, guide.parent.name) for name in cited}
        links = re.findall(r"\]\(([^)\s]*decisions/[^)\s]+)\)", shown)
        problems = [f"{name} is no test, or several" for name, place in places.items() if place is None]
        problems += [f"{link} does not exist" for link in links if not (guide.parent / link).is_file()]
        if not places and not links:
            problems.append("neither a test nor a decision")
        for id_ in ids.split(", "):
            found = tuple(place for place in places.values() if place)
            yield Requirement(id_, text, found, tuple(links), tuple(problems))


def problems(pack: str, table: Sequence[Requirement]) -> Iterator[str]:
    """What is wrong with the table of a pack, one line each."""
    ids = [requirement.id for requirement in table]
    yield from (f"{pack}: {id_}: has {ids.count(id_)} rows" for id_ in dict.fromkeys(ids) if ids.count(id_) > 1)
    for requirement in table:
        yield from (f"{pack}: {requirement.id}: {problem}" for problem in requirement.problems)


def named_in(specification: str) -> list[str]:
    """What a specification numbers or names: stories, risks, criteria, tasks, requirements, scenarios, headings."""
    found = re.findall(rf"\b{ID}\b", specification)
    found += re.findall(r"^#+ ((?:Requirement|Scenario): .+)$", specification, re.MULTILINE)
    criteria = specification.partition("## Acceptance Criteria")[2].partition("\n---")[0]
    found += [f"AC {number}" for number in re.findall(r"^(\d+)\. ", criteria, re.MULTILINE)]
    for task, steps in re.findall(r"^- \[x\] \*\*Task (\w+):.*\n((?: +- .*\n)*)", specification, re.MULTILINE):
        found += [f"Task {task}.{number}" for number, _ in enumerate(steps.splitlines(), 1)]
    if not any(name.startswith(("AC ", "Scenario: ")) for name in found):
        found += headings(specification)
    return list(dict.fromkeys(found))


def headings(specification: str) -> Iterator[str]:
    """The innermost headings, without those of sections that are not relevant or ask for nothing."""
    parts = re.split(r"^(##+) (.+)\n", specification, flags=re.MULTILINE)[1:]
    levels, names, texts = parts[::3], parts[1::3], parts[2::3]
    for level, name, text, following in zip(levels, names, texts, [*levels[1:], ""], strict=True):
        if len(following) <= len(level) and "Not relevant" not in text and name not in NO_REQUIREMENTS:
            yield name


def missing(specification: str, table: Sequence[Requirement]) -> list[str]:
    """What the specification names and the table does not. `Heading: part` stands for the heading."""
    ids = {requirement.id for requirement in table}
    ids |= {id_.partition(": ")[0] for id_ in ids}
    return [name for name in named_in(specification) if name not in ids]


def report(specifications: Path | None) -> tuple[list[str], list[str]]:
    """A line for each requirement, with a line of totals after those of a pack; and a line for each problem."""
    lines: list[str] = []
    wrong: list[str] = []
    for pack, guide in guides().items():
        table = list(requirements(guide))
        shown = sum(bool(requirement.places) for requirement in table)
        tests = len({place for requirement in table for place in requirement.places})
        lines += [f"{pack}: {requirement}" for requirement in table]
        lines.append(
            f"{pack}: requirements: {len(table)}, with a test: {shown}, only with a decision: "
            f"{len(table) - shown}, tests: {tests}"
        )
        wrong += problems(pack, table)
        if specifications:
            text = (specifications / f"{pack}.md").read_text(encoding="utf-8")
            wrong += [f"{pack}: {name}: the table has no row for it" for name in missing(text, table)]
    return lines, wrong


def main(specifications: Path | None) -> int:
    """Print the report. Returns the exit code."""
    lines, wrong = report(specifications)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else None))
