"""Run benchmarks and write their results. One that fails does not stop the others."""

import argparse
import asyncio
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
from websockets.version import version as websockets_version

from bench.experiments import FORMS, Bench, Form
from bench.judge import Samples
from bench.lines import Line, select
from bench.load import compiler
from bench.peers import left_out, node_versions, starlette_versions
from bench.results import Result, measured_text, publish, question_of, target_text
from bench.rig import BUILD, HERE, POSTGRES, ROOT, Server, daemon_settings, postgres, raise_open_files
from bench.writers import pgbench, processors
from daemon import __version__
from daemon.embedded.binaries import find_binaries

LIMIT = 3600.0  # seconds for one experiment

Experiment = Callable[[Bench], Awaitable[Samples]]


def setup(form: Form, lines: list[str]) -> dict[str, str]:
    """The setup that produces the figures, as shown in RESULTS.md."""
    words = " ".join(["make bench", f"BENCH={form.name}", *([f'LINES="{" ".join(lines)}"'] if lines else [])])
    settings = ", ".join(f"{name}={value}" for name, value in daemon_settings().items())
    relays = "; ".join(filter(None, (node_versions(), starlette_versions())))
    return {
        "command": f"`{words}`: {form.rounds} rounds, {form.seconds:g} s a measurement",
        "machine": f"{processors()} processors ({_processor()}), Linux {platform.release()}",
        "versions": f"Rowcast {__version__}{_commit()}, PostgreSQL {find_binaries().version}, "
        f"Python {platform.python_version()}, asyncpg {asyncpg.__version__}, websockets {websockets_version}",
        **({"relays": relays} if relays else {}),
        "Postgres": ", ".join(f"{name} {value}" for name, value in POSTGRES.items()),
        "daemon": f"as shipped, with {settings}" if settings else "as shipped",
        "writers": "pgbench" if pgbench() else "asyncpg, in Python",
        "load client": "in C" if compiler() else "in Python, which costs as much as the server",
        "open files": f"{raise_open_files():,}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The commit of this checkout in brackets; empty if it is not a checkout."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f" ({revision.stdout.strip()})" if revision.returncode == 0 else ""


def log(text: str) -> None:
    """Print a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


async def run(lines: list[Line], form: Form, facts: dict[str, str], keep: Callable[[Result], object]) -> list[Result]:
    """Measure these lines. Lines that share an experiment share its run. `keep` gets each result at once."""
    results: list[Result] = []
    known: dict[Experiment, Samples | str] = {}
    async with postgres() as server:
        for place, line in enumerate(lines, 1):
            log(f"{line.name} ({place} of {len(lines)}): {line.what}")
            if line.experiment not in known:
                known[line.experiment] = await attempt(line.experiment, server, form)
            match known[line.experiment]:
                case str(failure):
                    result = Result(line.name, facts, failure=failure)
                    log(f"  failed: {failure}")
                case samples:
                    result = Result(line.name, facts, tuple(line.targets(form)), samples)
            for target in result.targets:
                verdict = "met" if target.met(result.samples) else "not met"
                measured = measured_text(target, result.samples)
                log(f"  {target.figure} of {target.peer} {target_text(target)}: {measured}  {verdict}")
            keep(result)
            results.append(result)
    return results


async def attempt(experiment: Experiment, server: Server, form: Form) -> Samples | str:
    """The samples of an experiment, or why it failed."""
    try:
        async with asyncio.timeout(LIMIT):
            return await experiment(Bench(server, form, lambda text: log(f"  {text}")))
    except TimeoutError:
        return f"it took more than {LIMIT:g} s"
    except Exception as error:  # noqa: BLE001 - the other lines still run
        return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def main() -> int:
    """Exit code 0 if every line was measured, whether its target was met or not."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("lines", nargs="*", help="the lines to run; default: all")
    parser.add_argument("--form", choices=FORMS, default=os.environ.get("BENCH") or "short")
    parser.add_argument("--into", type=Path, help="the folder for RESULTS.md and charts/; default: bench/")
    given = parser.parse_args()
    try:
        lines = select(given.lines)
    except ValueError as error:
        parser.error(str(error))
    form, began = FORMS[given.form], time.monotonic()
    # The figures of the tiny form mean nothing and must not replace real ones.
    into: Path = given.into or (BUILD / form.name if form.name == "tiny" else HERE)
    into.mkdir(parents=True, exist_ok=True)
    facts = setup(form, given.lines)
    for peer in left_out():
        log(f"left out: {peer}")
    results = asyncio.run(run(lines, form, facts, lambda one: publish(into, [one])))
    log(f"{(time.monotonic() - began) / 60:.1f} minutes; written to {into / 'RESULTS.md'}")
    for one in results:
        log(f"  {one.verdict:8} {one.name}: {question_of(one.name)}")
    return 1 if any(one.failure for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
