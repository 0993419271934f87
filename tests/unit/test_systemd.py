"""What the daemon and systemd say to each other, and that systemd has nothing to say against the unit."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import systemd
from daemon.files import folder
from daemon.settings import Settings
from daemon.systemd import alive, listen_fds, notify, watchdog_interval

UNIT = folder("systemd") / "rowcast.service"
MIN_MAJOR_VERSION = 250  # the first systemd-analyze that can judge a unit by its file alone
MAX_EXPOSED = 1.5  # of 10, as `systemd-analyze security` counts; a unit that hardens nothing has more than 9


@pytest.fixture
def systemd_hears() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.setblocking(False)  # a datagram to a local socket is there at once
        yield heard


# What is said.


def test_systemd_hears_what_it_is_told(
    systemd_hears: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd_hears.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert notify("READY=1")
    assert notify("WATCHDOG=1\nSTATUS=ready")
    assert [b"READY=1", b"WATCHDOG=1\nSTATUS=ready"] == [systemd_hears.recv(100), systemd_hears.recv(100)]


def test_the_socket_of_systemd_may_be_an_abstract_one(
    systemd_hears: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"rowcast-{secrets.token_hex(8)}"
    systemd_hears.bind(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    assert notify("STOPPING=1")
    assert b"STOPPING=1" == systemd_hears.recv(100)


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens-here", "vsock:2:1234"])
def test_where_nobody_hears_nothing_fails(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_without_systemd_there_is_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    assert not notify("READY=1")
    assert None is watchdog_interval()
    assert [] == listen_fds()


def test_a_full_socket_does_not_hold_the_watchdog_up(
    systemd_hears: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd_hears.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    told = 0
    while notify("WATCHDOG=1"):
        told += 1
    assert told > 0


def test_the_watchdog_is_fed_twice_as_often_as_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "15000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert 7.5 == watchdog_interval()
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert 7.5 == watchdog_interval()


def test_who_starts_asks_for_more_time_than_passes_until_it_asks_again() -> None:
    assert "WATCHDOG=1\nSTATUS=ready" == alive("ready", 7.5, starts=False)
    assert "WATCHDOG=1\nSTATUS=starting\nEXTEND_TIMEOUT_USEC=60000000" == alive("starting", 7.5, starts=True)
    assert alive("starting", 60, starts=True).endswith("\nEXTEND_TIMEOUT_USEC=240000000")


@pytest.mark.parametrize(("allowed", "pid"), [("15000000", "1"), ("0", ""), ("", ""), ("soon", "")])
def test_a_watchdog_of_somebody_else_is_not_fed(allowed: str, pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", allowed)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert None is watchdog_interval()


TAKE_OVER = """
import os
from daemon.systemd import listen_fds
os.environ["LISTEN_PID"] = str(os.getpid())  # as systemd does between fork and exec
os.environ["LISTEN_FDNAMES"] = "websockets:pages"
taken = listen_fds()
print([each.getsockname()[1] for each in taken])
print([os.get_inheritable(fd) for fd in (3, 4)], [name for name in os.environ if name.startswith("LISTEN_")])
print(listen_fds())
"""


def test_handed_sockets_are_taken_over_once_and_passed_on_to_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [first.getsockname()[1], second.getsockname()[1]]
        # The shell puts them where systemd would: from descriptor 3 on.
        places = f"3<&{first.fileno()} 4<&{second.fileno()}"
        told = subprocess.run(
            ["bash", "-c", f'exec {places} "$@"', "bash", sys.executable, "-c", TAKE_OVER],
            env={**os.environ, "LISTEN_FDS": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=(first.fileno(), second.fileno()),
            capture_output=True,
            text=True,
            check=True,
        )
    assert [str(ports), "[False, False] []", "[]"] == told.stdout.splitlines()


def test_sockets_handed_to_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert [] == listen_fds()
    assert "LISTEN_FDS" not in os.environ
    assert 3 == systemd.FIRST_FD


# The unit.


def settings_of(unit: str) -> dict[str, list[str]]:
    """Its settings by "Section.Name", with what each of its lines says. Raises AssertionError for anything else."""
    section, found = "", dict[str, list[str]]()
    for line in unit.splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if heading := re.fullmatch(r"\[(Unit|Service|Install)\]", line):
            section = heading[1]
            continue
        name, equals, value = line.partition("=")
        assert section and equals and re.fullmatch(r"[A-Z][A-Za-z]+", name), f"not a setting: {line!r}"
        found.setdefault(f"{section}.{name}", []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with a program that this machine has: systemd looks whether it is there."""
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"(?m)^(Exec\w+=).*", rf"\g<1>{sys.executable}", UNIT.read_text()))
    return unit


def analyzed(*command: str | Path) -> tuple[int, str]:
    """The exit code of a systemd-analyze command, and what it said."""
    told = subprocess.run(["systemd-analyze", *command], capture_output=True, text=True)
    return told.returncode, told.stdout + told.stderr


@pytest.fixture
def without_systemd(capsys: pytest.CaptureFixture[str]) -> bool:
    """Is there no systemd-analyze? Then it is said, and the tests look at what they can see for themselves."""
    version = analyzed("--version")[1].split() if shutil.which("systemd-analyze") else ["systemd", "0"]
    if int(version[1]) >= MIN_MAJOR_VERSION:
        return False
    with capsys.disabled():
        sys.stdout.write(
            f" (no systemd-analyze {MIN_MAJOR_VERSION} or newer here: the unit is read, but not verified) "
        )
    return True


def test_systemd_finds_nothing_wrong_with_the_unit(installed: Path, without_systemd: bool) -> None:
    if without_systemd:
        assert settings_of(UNIT.read_text())
        return
    assert (0, "") == analyzed("verify", "--recursive-errors=no", installed)


def test_the_unit_leaves_little_to_attack(installed: Path, without_systemd: bool) -> None:
    if without_systemd:
        hardening = settings_of(UNIT.read_text())
        for name in ("NoNewPrivileges", "PrivateDevices", "ProtectHome", "MemoryDenyWriteExecute", "DynamicUser"):
            assert ["yes"] == hardening[f"Service.{name}"]
        assert ["strict"] == hardening["Service.ProtectSystem"]
        assert [""] == hardening["Service.CapabilityBoundingSet"]
        return
    threshold = f"--threshold={MAX_EXPOSED * 10:.0f}"
    code, told = analyzed("security", "--offline=true", threshold, "--no-pager", installed)
    assert 0 == code, told


def test_the_unit_waits_for_the_daemon_and_watches_it() -> None:
    unit = settings_of(UNIT.read_text())
    assert ["notify"] == unit["Service.Type"]
    assert ["main"] == unit["Service.NotifyAccess"]
    assert ["/opt/rowcast/bin/daemon"] == unit["Service.ExecStart"]
    assert int(unit["Service.WatchdogSec"][0]) > 0
    assert ["on-failure"] == unit["Service.Restart"]


def test_the_daemon_has_longer_to_stop_than_its_clients_have_to_leave() -> None:
    unit = settings_of(UNIT.read_text())
    assert float(unit["Service.TimeoutStopSec"][0]) > Settings.model_fields["drain_seconds"].default


def test_the_unit_holds_no_secret_but_says_where_it_lies() -> None:
    unit = settings_of(UNIT.read_text())
    assert ["secret:/etc/rowcast/secret"] == unit["Service.LoadCredential"]
    assert ["-/etc/rowcast/rowcast.env"] == unit["Service.EnvironmentFile"]
    assert ["XDG_STATE_HOME=%S"] == unit["Service.Environment"]
