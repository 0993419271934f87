"""Looks for cases that fail, and cuts them down: `python -m tests.postgres.truth THEME FIRST COUNT`."""

import asyncio
import sys
import time
from collections import Counter

from daemon.schema import migrate
from tests.postgres.truth.generate import THEMES, make
from tests.postgres.truth.shrink import shrunk
from tests.postgres.truth.trial import Trial
from tests.support.postgres import FAST, ignore, running_server


def show(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


async def main(theme: str, first: int, count: int, cut: int) -> None:
    themes = list(THEMES) if theme == "every" else [theme]
    async with running_server(FAST) as server, server.database() as dsn:
        await migrate.apply(dsn, packs=(), report=ignore)
        async with Trial.opened(dsn) as trial:
            for name in themes:
                started, totals, refusals = time.monotonic(), Counter[str](), Counter[str]()
                for seed in range(first, first + count):
                    case = make(name, seed)
                    verdict = await trial.run(case)
                    totals["cases"] += 1
                    totals["invalid"] += bool(verdict.invalid)
                    totals["refused"] += bool(verdict.refused)
                    totals["committed"] += verdict.committed
                    totals["failed"] += verdict.failed
                    totals["changes"] += verdict.changes
                    refusals.update(reason[:90] for reason in verdict.refused)
                    if verdict.invalid:
                        show(f"{case.name}: invalid: {verdict.invalid}")
                    if verdict.problems:
                        totals["wrong"] += 1
                        show(f"{case.name}: {verdict.problems[0][:200]} {verdict.problems[-1][:100]}")
                        if totals["wrong"] <= cut:
                            small, problems = await shrunk(trial, case, seconds=60)
                            show(small.script(), *problems)
                show(f"{name} {dict(totals)} {time.monotonic() - started:.1f} s {dict(refusals)}")


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0))
