"""Parameters of the database URL, given to the real command and the real server."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from daemon.postgres.connect import connect
from tests.support.daemon import command


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("channel_binding=require", "the parameter channel_binding is not supported by the driver: leave it out"),
        ("gssencmode=require", "the parameter gssencmode must be disable or prefer"),
        ("search_path=public", "the parameter search_path does not exist"),
        ("sslcert=missing.crt&host=127.0.0.1", "the file of the parameter sslcert cannot be read"),
        ("host=127.0.0.1&sslmode=verify-full", "the parameter sslmode=verify-full requires sslrootcert"),
        ("service=missing", "the service is not defined"),
        ("options=-c%20nonsense%3D1", 'options: unrecognized configuration parameter "nonsense"'),
        ("options=-c%20jit%3Dx", 'options: parameter "..." requires a Boolean value'),
    ],
)
async def test_a_parameter_that_cannot_be_honoured_is_named_in_one_line(
    database: str, query: str, words: str
) -> None:
    url = urlsplit(database)
    dsn = url._replace(query=f"{url.query}&{query}" if "host=" not in query else query).geturl()
    code, output, errors = await command("check", DATABASE_URL=dsn)
    assert (78, "", 1) == (code, output, errors.count("\n")), errors
    assert words in errors


async def test_harmless_parameters_of_libpq_change_nothing(database: str, tmp_path: Path) -> None:
    harmless = (
        "&channel_binding=prefer&connect_timeout=5&keepalives=1&keepalives_idle=9&gssencmode=disable&sslsni=1"
        "&target_session_attrs=read-write&load_balance_hosts=disable&client_encoding=UTF8"
    )
    assert 0 == (await command("check", DATABASE_URL=database + harmless))[0]
    code, _, errors = await command("backup", str(tmp_path / "backup.sql"), DATABASE_URL=database + harmless)
    assert (0, "") == (code, errors)


async def test_options_and_the_name_of_an_application_reach_the_session(database: str) -> None:
    dsn = f"{database}&options=-c%20geqo%3Doff%20-c%20search_path%3Dpublic&application_name=my%20chat"
    session = await connect(dsn, application_name="test")
    shown = [await session.fetchval(f"show {name}") for name in ("geqo", "search_path", "application_name")]
    assert ["off", "pg_catalog, pg_temp", "my chat"] == shown
    await session.close()
