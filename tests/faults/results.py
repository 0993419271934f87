"""The table of docs/reliability.md: what was tried, what held, and what fails without the protection.

A run of a whole file writes its rows anew. Of a part of it, such as one mutant, only that part of a row is new.
"""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from daemon import __version__
from tests.faults.checker import Verdict
from tests.faults.harness import FORM, SEED, say
from tests.support.postgres import chosen_binaries

GUIDE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = "| No | Fault | How it was injected | What held | Figures | N | Without the protection |"
RULE = "|---|---|---|---|---|---|---|"
NOT_TRIED = "not tried: exercised, not proved"


@dataclass
class Row:
    """One fault."""

    cells: tuple[str, str, str, str, str]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _mutants(cell: str) -> dict[str, str]:
    """What a cell of the table says of each mutant."""
    return dict(re.findall(r"`([^`]+)`: (.*?)(?=; `|$)", cell))


class Results:
    """Collects rows by number; `publish` puts them into the guide, in the place of older ones."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._mutants: dict[str, dict[str, str]] = {}

    def held(self, number: str, fault: str, injected: str, held: str, figures: str, n: str) -> None:
        """This fault was survived."""
        say(f"{number}: {fault}; {injected}; {held}; {figures}; {n}")
        self._rows[number] = Row((fault, injected, held, figures, n))

    def caught(self, number: str, mutant: str, verdict: Verdict | str) -> None:
        """Without this protection the same fault was not survived."""
        say(f"{number} without protection ({mutant}): {verdict}")
        self._mutants.setdefault(number, {})[mutant] = str(verdict)

    def publish(self) -> None:
        """Write the guide's table."""
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
