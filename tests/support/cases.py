"""Many cases in one test, which runs all of them even if some fail."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable

import asyncpg
import pytest

from daemon.postgres.connect import Connection

Test = Callable[..., Awaitable[None]]


def for_each(names: str | tuple[str, ...], cases: Iterable[object]) -> Callable[[Test], Test]:
    """Like `pytest.mark.parametrize`, for a test that takes one `Connection`: each case is rolled back on it.

    Hundreds of cases in one test take the time of a few tests. The failure lists every case that failed.
    """

    def decorate(test: Test) -> Test:
        parameters = inspect.signature(test).parameters
        case_parameters = (names,) if isinstance(names, str) else names
        fixtures = {name: parameter for name, parameter in parameters.items() if name not in case_parameters}
        [connection_name] = [name for name, parameter in fixtures.items() if parameter.annotation is Connection]

        @functools.wraps(test)
        async def all_cases(**arguments: object) -> None:
            connection = arguments[connection_name]
            assert isinstance(connection, asyncpg.Connection)
            failed, count = [], 0
            for case in cases:
                count += 1
                values = (case,) if isinstance(names, str) else case
                assert isinstance(values, tuple)
                transaction = connection.transaction()
                await transaction.start()
                try:
                    await test(**arguments, **dict(zip(case_parameters, values, strict=True)))
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 reported at the end
                    case_name = ", ".join(str(getattr(value, "name", value)) for value in values)
                    failed.append(f"{case_name}: {type(error).__name__}: {error}")
                finally:
                    await transaction.rollback()
            assert count, "there are no cases"
            assert not failed, f"{len(failed)} of {count} cases:\n" + "\n".join(failed)

        all_cases.__signature__ = inspect.Signature(list(fixtures.values()))  # type: ignore[attr-defined]
        return all_cases

    return decorate
