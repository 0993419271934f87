"""Cuts a failing case down to the parts that make it fail."""

import time

from tests.postgres.truth.case import Case
from tests.postgres.truth.trial import Trial


async def shrunk(trial: Trial, case: Case, seconds: float) -> tuple[Case, list[str]]:
    """The smallest case found in that time, and its problems."""
    problems = (await trial.run(case)).problems
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for part in case.parts():
            if time.monotonic() > end:
                return case, problems
            verdict = await trial.run(part)
            if verdict.problems and not verdict.invalid:
                case, problems, smaller = part, verdict.problems, True
                break
    return case, problems
