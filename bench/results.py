"""The results of each line: stored in results.json, published in RESULTS.md and charts/.

A run of some lines replaces their results and keeps the others, each with the setup that produced it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.charts import Bar, bars
from bench.judge import Samples, Spread, Target
from bench.lines import LINES, UNITS, Unit
from bench.peers import RELAYS

HEAD = """# Benchmark results

`make bench` writes this file; [docs/performance.md](../docs/performance.md) explains what each line does and why.
Absolute figures apply only to the machine that produced them. A ratio compares two peers in the same round; wherever
there is a peer, the target is a ratio. The figures are the median of all rounds, with the minimum and maximum in
brackets. *Beside it* is the same ratio to the relays that the target is not about.
"""


@dataclass(frozen=True)
class Result:
    """One line: the results of its rounds, or why there are none; and its setup."""

    name: str
    setup: Mapping[str, str]
    targets: tuple[Target, ...] = ()
    samples: Samples = field(default_factory=Samples)
    failure: str = ""

    @property
    def met(self) -> bool:
        """Were all targets met?"""
        return not self.failure and all(target.met(self.samples) for target in self.targets)

    @property
    def verdict(self) -> str:
        """`met`, `not met` or `failed`."""
        return "failed" if self.failure else "met" if self.met else "not met"

    def as_json(self) -> dict[str, Any]:
        """This result as stored in results.json."""
        return {
            "setup": dict(self.setup),
            "targets": [asdict(target) for target in self.targets],
            "samples": self.samples.values,
            "failure": self.failure,
        }

    @classmethod
    def from_json(cls, name: str, kept: Mapping[str, Any]) -> "Result":
        """A result as stored in results.json."""
        targets = tuple(Target(**target) for target in kept["targets"])
        return cls(name, kept["setup"], targets, Samples(kept["samples"]), kept["failure"])


def publish(folder: Path, new: list[Result]) -> list[Result]:
    """Merge new results into the folder's results.json, RESULTS.md and charts/. Returns all results."""
    kept = folder / "results.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    known |= {result.name: result.as_json() for result in new}
    order = [line.name for line in LINES]
    all_results = [Result.from_json(name, known[name]) for name in sorted(known, key=order.index)]
    kept.write_text(json.dumps({one.name: one.as_json() for one in all_results}, indent=1) + "\n", encoding="utf-8")
    charts = folder / "charts"
    charts.mkdir(exist_ok=True)
    for result in all_results:
        path = charts / f"{result.name}.svg"
        path.unlink(missing_ok=True)
        if not result.failure:
            path.write_text(chart(result), encoding="utf-8")
    (folder / "RESULTS.md").write_text(report(all_results), encoding="utf-8")
    return all_results


def report(results: list[Result]) -> str:
    """The text of RESULTS.md."""
    parts = [HEAD, "| Line | What | Target | Measured | | Beside it |", "|---|---|---|---|---|---|"]
    parts += [f"| {' | '.join(cells)} |" for one in results for cells in _rows(one)]
    parts += ["", "## Setup", ""]
    setups: dict[str, list[str]] = {}
    for one in results:
        setups.setdefault("\n".join(f"- {name}: {value}" for name, value in one.setup.items()), []).append(one.name)
    for setup, names in setups.items():
        parts += [f"For {', '.join(names)}:", "", setup, ""]
    for one in results:
        parts += [f"## {one.name}", ""]
        if one.failure:
            parts += [f"Failed: {one.failure}", ""]
        else:
            parts += [f"![{question_of(one.name)}](charts/{one.name}.svg)", "", *_figures(one.samples), ""]
    return "\n".join(parts)


def question_of(name: str) -> str:
    """The question that a line asks."""
    return next(line.what for line in LINES if line.name == name)


def unit_of(figure: str) -> Unit:
    """The unit in which a figure is shown."""
    return UNITS.get(figure, Unit(figure))


def target_text(target: Target) -> str:
    """A target in a few words, without the name of its figure."""
    if target.sense == "+-":
        return f"within {target.bound:.0%} of {target.against}"
    sign = {">=": "≥", "<=": "≤", ">": ">"}[target.sense]
    if target.against is None:
        return f"{sign} {unit_of(target.figure).show(target.bound)}"
    return f"{sign} {target.bound:g} x {target.against}"


def measured_text(target: Target, samples: Samples) -> str:
    """The measurement, in the form of its target."""
    spread = target.measured(samples)
    if target.against is None:
        return _brackets(spread, unit_of(target.figure).show)
    subject = f"{target.peer}: " if target.sense == "+-" else ""
    return subject + _brackets(spread, lambda ratio: f"{ratio:.2f}") + " x"


def beside(target: Target, result: Result) -> list[Target]:
    """The same figure against each relay that the target is not about. Their bounds mean nothing."""
    return [
        replace(target, against=peer)
        for peer, figures in result.samples.values.items()
        if peer in RELAYS and peer not in (target.peer, target.against) and target.figure in figures
        if _shows(result.name, peer)
    ]


def _shows(line: str, peer: str) -> bool:
    """Is this peer among those that a line is about?"""
    [peers] = [one.peers for one in LINES if one.name == line]
    return not peers or peer in peers


def _brackets(spread: Spread, show: Callable[[float], str]) -> str:
    return f"{show(spread.median)} ({show(spread.minimum)} to {show(spread.maximum)})"


def _rows(result: Result) -> list[list[str]]:
    if result.failure:
        return [[result.name, question_of(result.name), "", result.failure, "failed", ""]]
    rows = []
    for target in result.targets:
        verdict = "met" if target.met(result.samples) else "not met"
        rows.append(
            [
                result.name,
                question_of(result.name),
                f"{unit_of(target.figure).name}: {target_text(target)}",
                measured_text(target, result.samples),
                verdict,
                "; ".join(f"{one.against}: {measured_text(one, result.samples)}" for one in beside(target, result)),
            ]
        )
    for row in rows[1:]:
        row[0] = row[1] = ""
    return rows


def _figures(samples: Samples) -> list[str]:
    order = {name: place for place, name in enumerate(UNITS)}
    found = dict.fromkeys(name for figures in samples.values.values() for name in figures)
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    table = [f"| | {' | '.join(unit_of(name).name for name in names)} |", "|---|" + "---:|" * len(names)]
    for peer, figures in samples.values.items():
        cells = [_brackets(Spread.of(figures[name]), unit_of(name).show) if name in figures else "" for name in names]
        table.append(f"| {peer} | {' | '.join(cells)} |")
    return table


def chart(result: Result) -> str:
    """A chart of the first target's figure, for each peer that has it, with the target marked."""
    first, *_ = result.targets
    unit = unit_of(first.figure)
    judged = {target.peer for target in result.targets}
    shown = [
        Bar(peer, [value * unit.factor for value in figures[first.figure]], peer in judged)
        for peer, figures in result.samples.values.items()
        if first.figure in figures and _shows(result.name, peer)
    ]
    base = Spread.of(result.samples.rounds(first.against, first.figure)).median if first.against else 1.0
    aim = base * unit.factor * (1 + first.bound if first.sense == "+-" else first.bound)
    return bars(
        result.name, question_of(result.name), unit.name, shown, Unit(unit.name).show, (aim, target_text(first))
    )
