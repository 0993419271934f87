"""Rowcast behind PgBouncer: it works in session mode, and names the pooler in any other mode."""

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from daemon.postgres.connect import PINNED, SESSION, Connection, connect, open_pool
from daemon.postgres.errors import TransactionPooler
from tests.acceptance.chat import Chat
from tests.support.daemon import command, daemon_process
from tests.support.pooler import running_pooler
from tests.support.postgres import passable_directory

ALL_IGNORED = "ignore_startup_parameters = " + ",".join(
    ["extra_float_digits", "options", *PINNED, *SESSION, "tcp_keepalives_idle", "tcp_keepalives_interval"]
)

COMMANDS = {
    "serve": (),
    "apply": ("--apply-ddl",),
    "check": ("check",),
    "rollback": ("rollback", "chatgenius"),
    "seed": ("seed",),
    "tail": ("tail", "users"),
    "dead letters": ("dead-letters", "list"),
    "backup": ("backup", "FILE"),
    "explain": ("explain", "--topic", "users", "--user", "ada"),
    "archive": ("archive", "antone", "--to", "FILE"),
}


@pytest.mark.parametrize("settings", ["", ALL_IGNORED])
async def test_a_daemon_delivers_through_a_pooler_in_session_mode(
    database: str, sql: Connection, settings: str
) -> None:
    chat = await Chat.begin(sql)
    async with running_pooler(database, "session", settings) as pooler, daemon_process(pooler.dsn) as daemon:
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            message = await chat.say("hello")
            [change] = await client.changes()
        assert message == change["key"]["id"]
        assert [] == daemon.warnings()


@pytest.mark.parametrize("size", [1, 20])
async def test_every_session_through_a_pooler_has_its_settings(empty_database: str, size: int) -> None:
    async with running_pooler(empty_database, "session", ALL_IGNORED, size=size) as pooler:
        pool = await open_pool(pooler.dsn, application_name="test", server_settings=SESSION, max_size=size)
        held = [await pool.acquire() for _ in range(size)]
        for connection in held:
            for name, value in {**PINNED, "enable_seqscan": "off", "lock_timeout": "5s"}.items():
                assert value == await connection.fetchval(f"show {name}")
        pool.terminate()


@pytest.mark.parametrize("name", COMMANDS)
async def test_each_command_names_a_pooler_in_transaction_mode(database: str, name: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in COMMANDS[name]]
    async with running_pooler(database, "transaction", ALL_IGNORED) as pooler:
        code, output, errors = await command(*arguments, DATABASE_URL=pooler.dsn)
    assert (33, "") == (code, output)
    assert (
        f"daemon: A pooler at 127.0.0.1:{pooler.port} shares sessions (transaction mode): connect to Postgres "
        "directly, or set pool_mode = session.\n"
    ) == errors


def make_certificate(key_file: Path, certificate_file: Path) -> None:
    """A key, and a certificate for 127.0.0.1 that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a pooler of the tests")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today)
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


async def test_the_doctor_knows_the_pooler_by_its_mode_and_whether_the_way_to_it_is_encrypted(database: str) -> None:
    with passable_directory() as directory:
        key, certificate = directory / "key.pem", directory / "certificate.pem"
        make_certificate(key, certificate)
        for file in (key, certificate):
            file.chmod(0o644)  # PgBouncer runs as another user
        tls = (
            "client_tls_sslmode = allow", f"client_tls_key_file = {key}", f"client_tls_cert_file = {certificate}"
        )  # fmt: skip
        verified = f"verify-full&sslrootcert={certificate}"
        async with running_pooler(database, "session", *tls) as pooler:
            for mode, line in {
                "disable": "warn  tls          the connection is not encrypted: ",
                "require": "warn  tls          TLSv1.3, ",
                verified: "ok    tls          TLSv1.3, ",
            }.items():
                dsn = pooler.dsn.replace("sslmode=disable", f"sslmode={mode}")
                code, output, _ = await command("doctor", DATABASE_URL=dsn)
                assert 0 == code, output
                assert "\nok    pooler       a pooler in session mode" in output
                assert f"\n{line}" in output
    async with running_pooler(database, "transaction") as pooler:
        code, output, _ = await command("doctor", DATABASE_URL=pooler.dsn)
    assert 1 == code
    assert "\nfail  database     A pooler at 127.0.0.1" in output


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("transaction", ""), ("transaction", "server_round_robin = 1"), ("statement", ""), ("statement", ALL_IGNORED)],
)
@pytest.mark.parametrize("size", [1, 5])
async def test_a_pooler_that_shares_sessions_is_recognized(
    empty_database: str, mode: str, settings: str, size: int
) -> None:
    async with running_pooler(empty_database, mode, settings, size=size) as pooler:
        for _ in range(3):
            with pytest.raises(TransactionPooler):
                await connect(pooler.dsn, application_name="test", attempts=1)
            with pytest.raises(TransactionPooler):
                await open_pool(pooler.dsn, application_name="test", attempts=1)
        # It left neither a setting nor a statement in the sessions that others use.
        other = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
        if mode == "transaction":
            async with other.transaction():
                assert PINNED["search_path"] != await other.fetchval("show search_path")
                assert 0 == await other.fetchval("select count(*) from pg_prepared_statements where name <> ''")
        other.terminate()


async def test_a_busy_pooler_in_transaction_mode_is_recognized(empty_database: str) -> None:
    async with running_pooler(empty_database, "transaction", size=4) as pooler:

        async def work() -> None:
            connection = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
            try:
                while True:
                    await connection.execute("begin; select 1; commit")
            finally:
                connection.terminate()

        others = [asyncio.create_task(work()) for _ in range(8)]
        try:
            for _ in range(20):
                with pytest.raises(TransactionPooler):
                    await connect(pooler.dsn, application_name="test", attempts=1)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)


async def test_a_daemon_ends_when_a_pooler_in_transaction_mode_comes_in_between(database: str) -> None:
    async with AsyncExitStack() as stack:
        before = await stack.enter_async_context(running_pooler(database, "session", ALL_IGNORED))
        port = before.port
        async with daemon_process(before.dsn) as daemon:
            await stack.aclose()
            async with running_pooler(database, "transaction", ALL_IGNORED, port=port):
                assert 33 == await daemon.process.wait()
            log = daemon.log.read_text()
    assert f"daemon: A pooler at 127.0.0.1:{port} shares sessions (transaction mode): " in log
    assert "DuplicatePreparedStatement" not in log


async def test_a_daemon_that_a_pooler_refuses_leaves_nothing_to_the_next_one(database: str, sql: Connection) -> None:
    chat = await Chat.begin(sql)
    lease = "select nonce, expires_at, backend_pid from rowcast.lease"
    before = await sql.fetchrow(lease)
    async with running_pooler(database, "transaction", ALL_IGNORED) as pooler:
        code, _, _ = await command(DATABASE_URL=pooler.dsn)
        assert (33, before) == (code, await sql.fetchrow(lease))
        async with asyncio.timeout(15), daemon_process(database) as daemon, daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            message = await chat.say("hello")
            [change] = await client.changes()
            assert message == change["key"]["id"]
