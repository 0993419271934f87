"""The systemd protocol, and the units."""

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon import systemd
from daemon.files import folder
from daemon.packs import bundled_jobs
from daemon.settings import Settings
from daemon.systemd import (
    listen_fds,
    notify,
    reloading_message,
    stopping_message,
    watchdog_interval,
    watchdog_message,
)

UNIT = folder("systemd") / "rowcast.service"
JOB = folder("systemd") / "rowcast-job@.service"
TIMER = folder("systemd") / "rowcast-job@.timer"
SOCKET = folder("systemd") / "rowcast.socket"
GATEWAY = folder("systemd") / "rowcast-gateway.service"
GATEWAY_SOCKET = folder("systemd") / "rowcast-gateway.socket"
DROP_IN = folder("systemd") / "notify-reload.conf"
MIN_SYSTEMD = 250  # the first systemd-analyze that can check a unit file without a running systemd
NOTIFY_RELOAD = 253  # the first that knows Type=notify-reload
MAX_EXPOSURE = 1.5  # of 10, as reported by `systemd-analyze security`; a unit without hardening has more than 9


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.setblocking(False)  # a datagram to a local socket arrives at once
        yield receiver


# The protocol.


def test_notifications_reach_the_socket_of_systemd(
    receiver: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert notify("READY=1")
    assert notify("WATCHDOG=1\nSTATUS=ready")
    assert [b"READY=1", b"WATCHDOG=1\nSTATUS=ready"] == [receiver.recv(100), receiver.recv(100)]


def test_notifications_reach_an_abstract_socket(receiver: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"rowcast-{secrets.token_hex(8)}"
    receiver.bind(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    assert notify("STOPPING=1")
    assert b"STOPPING=1" == receiver.recv(100)


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens-here", "vsock:2:1234"])
def test_a_notification_that_nobody_receives_raises_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_without_systemd_there_is_no_watchdog_and_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    assert not notify("READY=1")
    assert None is watchdog_interval()
    assert [] == listen_fds()


def test_a_full_socket_does_not_block_a_notification(
    receiver: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    sent = 0
    while notify("WATCHDOG=1"):
        sent += 1
    assert sent > 0


def test_the_watchdog_is_fed_twice_per_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "15000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert 7.5 == watchdog_interval()
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert 7.5 == watchdog_interval()


def test_each_message_of_a_start_extends_the_timeout_past_the_next_message() -> None:
    assert "WATCHDOG=1\nSTATUS=ready" == watchdog_message("ready", 7.5, starting=False)
    expected = "WATCHDOG=1\nSTATUS=starting\nEXTEND_TIMEOUT_USEC=60000000"
    assert expected == watchdog_message("starting", 7.5, starting=True)
    assert watchdog_message("starting", 60, starting=True).endswith("\nEXTEND_TIMEOUT_USEC=240000000")


def test_a_stop_extends_the_timeout_past_the_drain_of_clients() -> None:
    assert "STOPPING=1\nEXTEND_TIMEOUT_USEC=70000000" == stopping_message(60)


def test_a_reload_says_when_it_began_by_the_clock_of_systemd() -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    kind, _, began = reloading_message().partition("\nMONOTONIC_USEC=")
    assert "RELOADING=1" == kind
    assert before <= int(began) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


@pytest.mark.parametrize(("allowed", "pid"), [("15000000", "1"), ("0", ""), ("", ""), ("soon", "")])
def test_the_watchdog_of_another_process_is_not_fed(allowed: str, pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", allowed)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert None is watchdog_interval()


TAKE_SOCKETS = """
import os
from daemon.systemd import listen_fds
os.environ["LISTEN_PID"] = str(os.getpid())  # as systemd does between fork and exec
os.environ["LISTEN_FDNAMES"] = "websockets:pages"
taken = listen_fds()
print([each.getsockname()[1] for each in taken])
print([os.get_inheritable(fd) for fd in (3, 4)], [name for name in os.environ if name.startswith("LISTEN_")])
print(listen_fds())
"""


def test_passed_sockets_are_returned_once_and_not_inherited() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [first.getsockname()[1], second.getsockname()[1]]
        # Like systemd, the shell passes them from descriptor 3 on.
        places = f"3<&{first.fileno()} 4<&{second.fileno()}"
        process = subprocess.run(
            ["bash", "-c", f'exec {places} "$@"', "bash", sys.executable, "-c", TAKE_SOCKETS],
            env={**os.environ, "LISTEN_FDS": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=(first.fileno(), second.fileno()),
            capture_output=True,
            text=True,
            check=True,
        )
    assert [str(ports), "[False, False] []", "[]"] == process.stdout.splitlines()


def udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def datagrams() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def silent() -> socket.socket:
    return socket.socket()


def connected() -> socket.socket:
    """What systemd passes with Accept=yes."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours


def netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


@pytest.mark.parametrize(
    ("opened", "reason"),
    [
        (udp, "another type"),
        (datagrams, "another type"),
        (silent, "it does not listen"),
        (connected, "it does not listen"),
        (netlink, "another family"),
        (lambda: (folder("systemd") / "rowcast.socket").open("rb"), "Socket operation on non-socket"),
    ],
    ids=["udp", "datagrams", "silent", "connected", "netlink", "file"],
)
def test_a_passed_descriptor_that_no_client_can_connect_to_is_refused_in_one_line(
    opened: Callable[[], socket.socket], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as passed:
        fd = os.dup(passed.fileno())
        monkeypatch.setattr(systemd, "FIRST_FD", fd)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        with pytest.raises(systemd.BadSocket, match="use ListenStream= and no Accept=") as refusal:
            listen_fds()
        assert (78, reason) == (refusal.value.exit_code, refusal.value.reason)
        if reason == "Socket operation on non-socket":
            os.close(fd)


def test_sockets_passed_to_another_process_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert [] == listen_fds()
    assert "LISTEN_FDS" not in os.environ
    assert 3 == systemd.FIRST_FD


# The units.


def settings_of(unit: str) -> dict[str, list[str]]:
    """The values of the unit's settings, by "Section.Name". Raises AssertionError for a line that is no setting."""
    section, found = "", dict[str, list[str]]()
    for line in unit.splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if heading := re.fullmatch(r"\[(Unit|Service|Timer|Socket|Install)\]", line):
            section = heading[1]
            continue
        name, equals, value = line.partition("=")
        assert section and equals and re.fullmatch(r"[A-Z][A-Za-z]+", name), f"not a setting: {line!r}"
        found.setdefault(f"{section}.{name}", []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of the units with a program that exists on this machine, since systemd-analyze looks for it."""
    for unit in (UNIT, JOB, TIMER, SOCKET, GATEWAY, GATEWAY_SOCKET):
        text = re.sub(r"(?m)^(Exec\w+=).*", rf"\g<1>{sys.executable}", unit.read_text())
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*command: str | Path) -> tuple[int, str]:
    """The exit code and the output of a systemd-analyze command."""
    process = subprocess.run(["systemd-analyze", *command], capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture
def without_systemd(capsys: pytest.CaptureFixture[str]) -> bool:
    """True if there is no usable systemd-analyze. It is printed, and the tests check what they can on their own."""
    version = analyze("--version")[1].split() if shutil.which("systemd-analyze") else ["systemd", "0"]
    if int(version[1]) >= MIN_SYSTEMD:
        return False
    with capsys.disabled():
        sys.stdout.write(f" (no systemd-analyze {MIN_SYSTEMD} or newer here: the unit is read, but not verified) ")
    return True


@pytest.mark.parametrize("unit", [UNIT, JOB, TIMER, SOCKET, GATEWAY, GATEWAY_SOCKET], ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, installed: Path, without_systemd: bool) -> None:
    if without_systemd:
        assert settings_of(unit.read_text())
        return
    assert (0, "") == analyze("verify", "--recursive-errors=no", installed / unit.name)


def test_a_drop_in_lets_systemd_send_the_signal_and_older_ones_have_a_command_for_it(
    installed: Path, without_systemd: bool
) -> None:
    assert {"Service.Type": ["notify-reload"], "Service.ExecReload": [""]} == settings_of(DROP_IN.read_text())
    assert ["/bin/kill -HUP $MAINPID"] == settings_of(UNIT.read_text())["Service.ExecReload"]
    folder_of_drop_ins = installed / f"{UNIT.name}.d"
    folder_of_drop_ins.mkdir()
    shutil.copy(DROP_IN, folder_of_drop_ins)
    if not without_systemd:
        is_known = int(analyze("--version")[1].split()[1]) >= NOTIFY_RELOAD
        is_accepted = (0, "") == analyze("verify", "--recursive-errors=no", installed / UNIT.name)
        assert is_known == is_accepted


@pytest.mark.parametrize("unit", [UNIT, JOB, GATEWAY], ids=lambda unit: unit.name)
def test_the_unit_is_hardened_against_attacks(unit: Path, installed: Path, without_systemd: bool) -> None:
    if without_systemd:
        hardening = settings_of(unit.read_text())
        for name in ("NoNewPrivileges", "PrivateDevices", "ProtectHome", "MemoryDenyWriteExecute", "DynamicUser"):
            assert ["yes"] == hardening[f"Service.{name}"]
        assert ["strict"] == hardening["Service.ProtectSystem"]
        assert [""] == hardening["Service.CapabilityBoundingSet"]
        return
    threshold = f"--threshold={MAX_EXPOSURE * 10:.0f}"
    code, output = analyze("security", "--offline=true", threshold, "--no-pager", installed / unit.name)
    assert 0 == code, output


def test_a_timer_starts_the_command_of_its_job_once_all_jobs_are_due() -> None:
    job, timer = settings_of(JOB.read_text()), settings_of(TIMER.read_text())
    assert ["/opt/rowcast/bin/daemon jobs run %i"] == job["Service.ExecStart"]
    assert ["oneshot"] == job["Service.Type"]
    [calendar] = timer["Timer.OnCalendar"]
    assert f"*-*-* {max(job.at for job in bundled_jobs().values()):%H:%M:%S} UTC" == calendar
    assert ["true"] == timer["Timer.Persistent"]
    assert ["timers.target"] == timer["Install.WantedBy"]


def test_the_units_share_their_sandbox_and_their_files() -> None:
    def of(unit: Path) -> str:
        return unit.read_text().partition("# Sandbox")[2].partition("[Install]")[0]

    only_of_the_service = set(of(UNIT).splitlines()) - set(of(JOB).splitlines())
    settings = {line for line in only_of_the_service if line and not line.startswith("#")}
    assert {"RuntimeDirectory=rowcast", "Environment=XDG_STATE_HOME=%S"} == settings
    assert set(of(JOB).splitlines()) <= set(of(UNIT).splitlines())


def test_the_unit_of_a_gateway_is_that_of_the_daemon_but_for_its_command_its_files_and_its_names() -> None:
    daemon, gateway = settings_of(UNIT.read_text()), settings_of(GATEWAY.read_text())
    assert daemon.keys() == gateway.keys()
    different = {name: values for name, values in gateway.items() if values != daemon[name]}
    assert {"Unit.Description", "Unit.After"} < different.keys()
    assert {
        "Service.ExecStart": ["/opt/rowcast/bin/daemon gateway"],
        "Service.EnvironmentFile": ["-/etc/rowcast/gateway.env"],
        "Service.User": ["rowcast-gateway"],
        "Service.StateDirectory": ["rowcast-gateway"],
        "Service.RuntimeDirectory": ["rowcast-gateway"],
    } == {name: values for name, values in different.items() if name.startswith("Service.")}
    of_daemon, of_gateway = settings_of(SOCKET.read_text()), settings_of(GATEWAY_SOCKET.read_text())
    assert {**of_daemon, "Unit.Description": of_gateway["Unit.Description"]} == of_gateway
    assert GATEWAY_SOCKET.stem == GATEWAY.stem


def test_the_unit_waits_for_readiness_and_has_a_watchdog() -> None:
    unit = settings_of(UNIT.read_text())
    assert ["notify"] == unit["Service.Type"]
    assert ["main"] == unit["Service.NotifyAccess"]
    assert ["/opt/rowcast/bin/daemon"] == unit["Service.ExecStart"]
    assert int(unit["Service.WatchdogSec"][0]) > 0
    assert ["always"] == unit["Service.Restart"]  # an end by SIGHUP counts as a success, and leaves the unit dead


def lines_of(unit: str, name: str) -> list[str]:
    """The values of a setting, including those that are commented out."""
    return re.findall(rf"^#?{name}=(.*)$", unit, re.MULTILINE)


@pytest.mark.parametrize("code", [0, 13])
def test_the_line_that_applies_the_schema_first_is_one_process_with_its_exit_code(code: int, tmp_path: Path) -> None:
    [_, line] = lines_of(UNIT.read_text(), "ExecStart")
    program = tmp_path / "daemon"
    program.write_text(f'#!/bin/sh\necho "$$ $*"\n[ "$1" ] && exit {code}\nexit 0\n')
    program.chmod(0o755)
    command = shlex.split(line.replace("/opt/rowcast/bin/daemon", str(program)))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert code == process.returncode
    calls = [call.partition(" ") for call in output.splitlines()]
    assert ["--apply-ddl", ""][: 1 if code else 2] == [arguments for _, _, arguments in calls]
    assert code or calls[-1][0] == str(process.pid)  # so that it is the process that may notify systemd


def test_no_failing_helper_of_the_unit_escapes_the_list_of_final_exit_codes() -> None:
    assert [] == lines_of(UNIT.read_text(), "ExecStartPre")


FINAL = {
    2: "a mistake on the command line",
    11: "a wrong user, password or SSH key",
    13: "no such database",
    14: "a right is missing, or SSH does not forward",
    16: "an object is in the way of the DDL",
    17: "rows are in the way of the DDL",
    18: "rows are in the way of the DDL",
    21: "the database is newer",
    22: "the history is of something else",
    25: "objects are in the way of the DDL",
    26: "the server is too old",
    27: "the encoding is not supported",
    29: "a superuser in production",
    40: "the role has too many rights",
    41: "a library is missing",
    51: "a library is missing",
    64: "a setting names what is not there",
    65: "a file of SQL is wrong",
    76: "the host key of SSH is not the known one",
    78: "a setting is wrong",
}
"""The codes of a service after which a restart cannot help, since only an operator can mend what they say."""

PASSING = {
    1: "whatever prevented applying the DDL",
    10: "the database starts later",
    12: "DNS comes back",
    19: "locks and timeouts pass",
    20: "nobody knows",
    28: "a fail-over ends",
    31: "a standby is promoted",
    32: "another machine applies the DDL",
    33: "a pooler is restarted",
    36: "the log becomes readable",
    39: "numbering becomes possible",
    49: "the identity provider comes back",
    69: "whoever has the port ends",
    70: "an internal error, which a restart may not meet again",
    73: "a disk has room again",
}
"""The codes of a service that may pass by themselves."""

OF_COMMANDS = {15, 23, 24, 30, 34, 35, 37, 38, 42, 43, 44, 46, 47, 48, 71, 74, 75, 77}
"""The codes that no service ends with, or after which a job is tried again."""


def documented_exit_codes() -> set[int]:
    """The codes of the table in docs/operate.md, which is checked against the code, and those of its text."""
    text = (folder("systemd").parent / "docs/operate.md").read_text()
    return {2, 70, *map(int, re.findall(r"^\| ([0-9]+) \| `", text, re.MULTILINE))}


def test_every_exit_code_is_final_for_the_units_or_passes_by_itself() -> None:
    assert documented_exit_codes() == FINAL.keys() | PASSING.keys() | OF_COMMANDS
    assert not FINAL.keys() & PASSING.keys()
    assert not (FINAL.keys() | PASSING.keys()) & OF_COMMANDS


@pytest.mark.parametrize(
    ("unit", "more"), [(UNIT, set()), (GATEWAY, set()), (JOB, {32})], ids=["daemon", "gateway", "job"]
)
def test_a_unit_is_not_restarted_after_what_only_an_operator_can_mend(unit: Path, more: set[int]) -> None:
    [listed] = settings_of(unit.read_text())["Service.RestartPreventExitStatus"]
    assert sorted(FINAL.keys() | more) == [int(code) for code in listed.split()]


def commands_of_the_guide() -> list[str]:
    """The lines of the shell blocks in the section on how to set Rowcast up."""
    text = (folder("systemd").parent / "docs/operate.md").read_text()
    section = text.partition("\n## Set up\n")[2].partition("\n## ")[0]
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]


def test_the_commands_of_the_guide_are_for_root_and_name_each_program_as_root_finds_it() -> None:
    commands = commands_of_the_guide()
    assert 0 == subprocess.run(["bash", "-n"], input="\n".join(commands), text=True).returncode
    for line in commands:
        if "daemon --" in line:  # over a socket, root is not the role that owns the database
            assert line.startswith("runuser -u rowcast -- ")
            assert " /opt/rowcast/bin/daemon --" in line
        if re.search(r"\bcreate(user|db)\b", line):
            assert line.startswith("runuser -u postgres -- ")


def test_the_stop_timeout_is_longer_than_the_drain_of_clients() -> None:
    unit = settings_of(UNIT.read_text())
    assert float(unit["Service.TimeoutStopSec"][0]) > Settings.model_fields["drain_seconds"].default


def test_the_socket_is_that_of_the_service_and_listens_where_the_daemon_does() -> None:
    assert SOCKET.stem == UNIT.stem
    unit = settings_of(SOCKET.read_text())
    assert [str(Settings.model_fields["listen"].default)] == unit["Socket.ListenStream"]
    assert "Socket.Accept" not in unit
    assert ["sockets.target"] == unit["Install.WantedBy"]


def test_the_unit_loads_the_secret_from_a_file() -> None:
    unit = settings_of(UNIT.read_text())
    assert ["secret:/etc/rowcast/secret"] == unit["Service.LoadCredential"]
    assert ["-/etc/rowcast/rowcast.env"] == unit["Service.EnvironmentFile"]
    assert ["XDG_STATE_HOME=%S"] == unit["Service.Environment"]
