"""Run the lines of the bench, and write what was found. One that fails does not stop the others."""

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
from bench.lines import Line, chosen
from bench.load import compiler
from bench.results import Found, answered, asked, publish, what_of
from bench.rig import BUILD, HERE, POSTGRES, ROOT, Server, asked_of_the_daemon, postgres, raise_open_files
from bench.writers import pgbench, processors
from daemon import __version__
from daemon.embedded.binaries import find_binaries

LIMIT = 3600.0  # seconds for one experiment

Experiment = Callable[[Bench], Awaitable[Samples]]


def setup(form: Form, lines: list[str]) -> dict[str, str]:
    """What the figures stand on."""
    words = " ".join(["make bench", f"BENCH={form.name}", *([f'LINES="{" ".join(lines)}"'] if lines else [])])
    settings = ", ".join(f"{name}={value}" for name, value in asked_of_the_daemon().items())
    return {
        "command": f"`{words}`: {form.rounds} rounds, {form.seconds:g} s a measurement",
        "machine": f"{processors()} processors ({_processor()}), Linux {platform.release()}",
        "versions": f"Rowcast {__version__}{_commit()}, PostgreSQL {find_binaries().version}, "
        f"Python {platform.python_version()}, asyncpg {asyncpg.__version__}, websockets {websockets_version}",
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
    """The commit of this checkout, if it is one."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f" ({told.stdout.strip()})" if told.returncode == 0 else ""


def say(text: str) -> None:
    """To whoever waits."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


async def run(lines: list[Line], form: Form, facts: dict[str, str], keep: Callable[[Found], object]) -> list[Found]:
    """Measure these lines; what several of them need is measured once. Each is kept as soon as it is there."""
    every: list[Found] = []
    known: dict[Experiment, Samples | str] = {}
    async with postgres() as server:
        for place, line in enumerate(lines, 1):
            say(f"{line.name} ({place} of {len(lines)}): {line.what}")
            if line.experiment not in known:
                known[line.experiment] = await attempt(line.experiment, server, form)
            match known[line.experiment]:
                case str(failure):
                    found = Found(line.name, facts, failure=failure)
                    say(f"  failed: {failure}")
                case samples:
                    found = Found(line.name, facts, tuple(line.targets(form)), samples)
            for target in found.targets:
                verdict = "met" if target.met(found.samples) else "not met"
                measured = answered(target, found.samples)
                say(f"  {target.figure} of {target.peer} {asked(target)}: {measured}  {verdict}")
            keep(found)
            every.append(found)
    return every


async def attempt(experiment: Experiment, server: Server, form: Form) -> Samples | str:
    """What an experiment finds, or why it finds nothing."""
    try:
        async with asyncio.timeout(LIMIT):
            return await experiment(Bench(server, form, lambda text: say(f"  {text}")))
    except TimeoutError:
        return f"it took more than {LIMIT:g} s"
    except Exception as error:  # noqa: BLE001 - whatever it is, the other lines go on
        return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def main() -> int:
    """0 if every line was measured, whatever it found."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("lines", nargs="*", help="which lines; all without any")
    parser.add_argument("--form", choices=FORMS, default=os.environ.get("BENCH") or "short")
    parser.add_argument("--into", type=Path, help="where RESULTS.md and charts/ are written, if not to bench/")
    given = parser.parse_args()
    try:
        lines = chosen(given.lines)
    except ValueError as error:
        parser.error(str(error))
    form, began = FORMS[given.form], time.monotonic()
    # What the tiny form finds means nothing, and is not to replace what does.
    into: Path = given.into or (BUILD / form.name if form.name == "tiny" else HERE)
    into.mkdir(parents=True, exist_ok=True)
    facts = setup(form, given.lines)
    found = asyncio.run(run(lines, form, facts, lambda one: publish(into, [one])))
    say(f"{(time.monotonic() - began) / 60:.1f} minutes; written to {into / 'RESULTS.md'}")
    for one in found:
        say(f"  {one.verdict:8} {one.name}: {what_of(one.name)}")
    return 1 if any(one.failure for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
