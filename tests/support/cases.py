"""Many cases in one test, each of which is tried whatever became of the others."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable

import asyncpg
import pytest

from daemon.postgres.connect import Connection

Test = Callable[..., Awaitable[None]]


def for_each(names: str | tuple[str, ...], cases: Iterable[object]) -> Callable[[Test], Test]:
    """Like `pytest.mark.parametrize` for a test with one `Connection`, in whose transaction each case is undone.

    As one test, hundreds of cases take the time of a few. It fails with all cases that did.
    """

    def decorate(test: Test) -> Test:
        parameters = inspect.signature(test).parameters
        missing = (names,) if isinstance(names, str) else names
        fixtures = {name: parameter for name, parameter in parameters.items() if name not in missing}
        [holder] = [name for name, parameter in fixtures.items() if parameter.annotation is Connection]

        @functools.wraps(test)
        async def all_cases(**given: object) -> None:
            connection = given[holder]
            assert isinstance(connection, asyncpg.Connection)
            failed, count = [], 0
            for case in cases:
                count += 1
                values = (case,) if isinstance(names, str) else case
                assert isinstance(values, tuple)
                transaction = connection.transaction()
                await transaction.start()
                try:
                    await test(**given, **dict(zip(missing, values, strict=True)))
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 it is told at the end
                    what = ", ".join(str(getattr(value, "name", value)) for value in values)
                    failed.append(f"{what}: {type(error).__name__}: {error}")
                finally:
                    await transaction.rollback()
            assert count, "there is no case"
            assert not failed, f"{len(failed)} of {count} cases:\n" + "\n".join(failed)

        all_cases.__signature__ = inspect.Signature(list(fixtures.values()))  # type: ignore[attr-defined]
        return all_cases

    return decorate
