"""Clients see exactly what the tables say: random tables, writers and writes, on a real Postgres.

`python -m tests.postgres.truth THEME SEED` runs one case again.
"""

from collections.abc import AsyncIterator
from functools import partial

import pytest

from daemon.schema import migrate
from tests.faults.harness import LONG
from tests.postgres.truth.generate import THEMES, make
from tests.postgres.truth.mutants import MUTANTS, mutated
from tests.postgres.truth.shrink import shrunk
from tests.postgres.truth.trial import Trial
from tests.postgres.truth.values import BUILT_IN, WITHOUT_INPUT
from tests.support.postgres import Server, ignore

CASES = 500 if LONG else 5  # of each theme
TIMEOUT = 3600 if LONG else 120
MAX_CASES_OF_A_MUTANT = 300
SHRINK_TIME = 60.0  # seconds


@pytest.fixture(scope="module")
async def trial(postgres: Server) -> AsyncIterator[Trial]:
    template = await postgres.template("truth", partial(migrate.apply, packs=(), report=ignore))
    async with postgres.database(template) as dsn, Trial.opened(dsn) as trial:
        yield trial


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("theme", THEMES)
async def test_clients_see_exactly_what_the_tables_say(trial: Trial, theme: str) -> None:
    committed = refused = 0
    for seed in range(CASES):
        case = make(theme, seed)
        verdict = await trial.run(case)
        assert not verdict.invalid, f"{case.name}: {verdict.invalid}"
        if verdict.problems:
            small, problems = await shrunk(trial, case, SHRINK_TIME)
            pytest.fail("\n".join((small.script(), *problems)))
        committed += verdict.committed
        refused += bool(verdict.refused)
    assert committed > CASES, "most transactions fail: nothing is tested"
    assert refused <= CASES / 2, "most tables are refused: nothing is tested"


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("name", MUTANTS)
async def test_a_capture_without_one_of_its_safeguards_is_caught(trial: Trial, name: str) -> None:
    mutant = MUTANTS[name]
    if trial.admin.get_server_version().major < mutant.since:
        return
    async with mutated(trial, mutant):
        for seed in range(mutant.seed, mutant.seed + MAX_CASES_OF_A_MUTANT):
            if (await trial.run(make(mutant.theme, seed))).problems:
                return
    pytest.fail(f"{MAX_CASES_OF_A_MUTANT} cases of {mutant.theme} do not notice it")


async def test_every_type_that_a_column_can_have_has_values(trial: Trial) -> None:
    types = await trial.admin.fetch(
        """select t.oid::regtype::text from pg_type as t
           where t.typnamespace = 'pg_catalog'::regnamespace and t.typtype in ('b', 'r', 'm')
             and t.typname !~ '^_'"""
    )
    known = await trial.admin.fetch(
        "select distinct n::regtype::text from unnest($1::text[]) as n", [t.sql for t in BUILT_IN]
    )
    assert {name for [name] in types} - WITHOUT_INPUT == {name for [name] in known}
