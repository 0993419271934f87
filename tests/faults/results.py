"""The table of docs/reliability.md: what was tried, what held, and what fails without the safeguard.

A run of a whole file replaces its rows. A run of a part, such as one mutant, replaces only that part of a row.
"""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from daemon import __version__
from tests.faults.checker import Verdict
from tests.faults.harness import FORM, SEED, report
from tests.support.postgres import chosen_binaries

GUIDE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = "| No | Fault | How it was injected | What held | Figures | N | Without the safeguard |"
RULE = "|---|---|---|---|---|---|---|"
NOT_TRIED = "not tried: exercised, not proved"


@dataclass
class Row:
    """One fault."""

    cells: tuple[str, str, str, str, str]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _mutants(cell: str) -> dict[str, str]:
    """The result of each mutant in a cell of the table."""
    return dict(re.findall(r"`([^`]+)`: (.*?)(?=; `|$)", cell))


class Results:
    """Collects rows by number; `publish` writes them to the guide in place of the older ones."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._mutants: dict[str, dict[str, str]] = {}

    def held(self, number: str, fault: str, injected: str, held: str, figures: str, n: str) -> None:
        """Record that this fault was survived."""
        report(f"{number}: {fault}; {injected}; {held}; {figures}; {n}")
        self._rows[number] = Row((fault, injected, held, figures, n))

    def caught(self, number: str, mutant: str, verdict: Verdict | str) -> None:
        """Record that the same fault was not survived with this safeguard removed."""
        report(f"{number} without the safeguard ({mutant}): {verdict}")
        self._mutants.setdefault(number, {})[mutant] = str(verdict)

    def publish(self) -> None:
        """Update the guide's table."""
        if not FORM or not (self._rows or self._mutants):
            return
        text = GUIDE.read_text(encoding="utf-8")
        before, _, rest = text.partition(HEAD)
        table, _, after = rest.partition("\n\n")
        rows = {number: cells for number, *cells in map(_cells, table.splitlines()[2:])}
        for number in self._rows.keys() | self._mutants.keys() & rows.keys():
            new, caught = self._rows.get(number), self._mutants.get(number, {})
            *old, last = rows.get(number, [NOT_TRIED])
            if new is None or not caught:
                caught = _mutants(last) | caught
            mutants = "; ".join(f"`{mutant}`: {verdict}" for mutant, verdict in caught.items()) or NOT_TRIED
            rows[number] = [*(new.cells if new else old), mutants]
        ordered = sorted(rows, key=lambda number: (int(number.partition(" ")[0]), number))
        body = "\n".join([HEAD, RULE, *(f"| {' | '.join([number, *rows[number]])} |" for number in ordered)])
        made = (
            f"Rowcast {__version__}, PostgreSQL {chosen_binaries().version} (rows that say so: another), Python "
            f"{platform.python_version()}, {os.cpu_count()} cores, fsync on, seed {SEED}."
        )
        before = re.sub(r"Rowcast [^\n]* seed \d+\.", made, before)
        GUIDE.write_text(f"{before}{body}\n\n{after}", encoding="utf-8")
