"""The table of docs/reliability.md: what was tried, what held, and what fails without the protection."""

import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

from daemon import __version__
from tests.faults.checker import Verdict
from tests.faults.harness import FORM, SEED, say
from tests.support.postgres import chosen_binaries

GUIDE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = "| No | Fault | How it was injected | What held | Figures | N | Without the protection |"
RULE = "|---|---|---|---|---|---|---|"


@dataclass
class Row:
    """One fault."""

    cells: tuple[str, str, str, str, str]
    mutants: list[str] = field(default_factory=list)


class Results:
    """Collects rows by number; `publish` puts them into the guide, in the place of older ones."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._mutants: dict[str, list[str]] = {}

    def held(self, number: str, fault: str, injected: str, held: str, figures: str, n: str) -> None:
        """This fault was survived."""
        say(f"{number}: {fault}; {injected}; {held}; {figures}; {n}")
        self._rows[number] = Row((fault, injected, held, figures, n))

    def caught(self, number: str, mutant: str, verdict: Verdict | str) -> None:
        """Without this protection the same fault was not survived."""
        say(f"{number} without protection ({mutant}): {verdict}")
        self._mutants.setdefault(number, []).append(f"`{mutant}`: {verdict}")

    def publish(self) -> None:
        """Write the guide's table."""
        if not FORM or not self._rows:
            return
        text = GUIDE.read_text(encoding="utf-8")
        before, _, rest = text.partition(HEAD)
        table, _, after = rest.partition("\n\n")
        rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
        for number, row in self._rows.items():
            mutants = "; ".join(self._mutants.get(number, ())) or "not tried: exercised, not proved"
            cells = (number, *row.cells, mutants)
            rows[number] = f"| {' | '.join(cells)} |"
        ordered = sorted(rows, key=lambda number: (int(number.partition(" ")[0]), number))
        body = "\n".join([HEAD, RULE, *(rows[number] for number in ordered)])
        made = (
            f"Rowcast {__version__}, PostgreSQL {chosen_binaries().version} (rows that say so: another), Python "
            f"{platform.python_version()}, {os.cpu_count()} cores, fsync on, seed {SEED}."
        )
        before = re.sub(r"Rowcast [^\n]* seed \d+\.", made, before)
        GUIDE.write_text(f"{before}{body}\n\n{after}", encoding="utf-8")
