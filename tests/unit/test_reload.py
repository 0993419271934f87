"""Which settings a reload changes, and what it says about the others."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from structlog.testing import capture_logs

from daemon.app.node import door_of, gateway_limits
from daemon.app.serve import _reload_on
from daemon.settings import Reloads, Settings, refreshed
from daemon.settings.load import load
from daemon.settings.reload import CERTIFICATE, DOOR, KEYS

SECRET = "canary-" * 6


def test_only_settings_that_exist_can_be_reloaded() -> None:
    assert KEYS | CERTIFICATE | DOOR <= Settings.model_fields.keys()


def test_everything_that_the_door_and_the_limits_are_made_from_is_reloaded_unless_it_cannot_be() -> None:
    read: set[str] = set()

    class Recording:
        def __getattr__(self, field: str) -> object:
            read.add(field)
            return getattr(load(), field)

    door_of(Recording())  # type: ignore[arg-type]
    gateway_limits(Recording())  # type: ignore[arg-type]
    assert {"environment", "deflate_bytes", "tls_certificate"} == read - DOOR


def test_tls_neither_begins_nor_ends_with_a_reload() -> None:
    plain, one, two = (
        load(),
        load(tls_certificate=Path("a"), tls_key=Path("a")),
        load(tls_certificate=Path("b"), tls_key=Path("b")),
    )
    assert plain == refreshed(plain, one)
    assert one == refreshed(one, plain)
    assert two == refreshed(one, two)


async def test_a_reload_that_meets_a_bug_ends_nothing_and_the_next_one_reloads() -> None:
    class Manager:
        """What systemd would get."""

        received: ClassVar[list[str]] = []

        def notify(self, state: str) -> bool:
            self.received.append(state.partition("=")[0])
            ready.set()
            return True

    def read() -> Settings:
        if not failed:
            failed.append(True)
            raise RuntimeError("a bug")
        return load(origins=("https://a.example",))

    failed: list[bool] = []
    hangup, ready = asyncio.Event(), asyncio.Event()
    with capture_logs() as logged:
        task = asyncio.create_task(_reload_on(hangup, Reloads(read, load()), Manager()))  # type: ignore[arg-type]
        for expected in (2, 4):
            hangup.set()
            while len(Manager.received) < expected:
                ready.clear()
                await ready.wait()
        task.cancel()
    assert ["RELOADING", "READY"] * 2 == Manager.received
    assert ["internal_error", "reloaded"] == [line["event"] for line in logged]


EARLY = """
import asyncio, os, signal
from daemon.app.serve import _handle_signals
from daemon.cli.root import _hold_hangup
from daemon.settings.load import load
from daemon.supervisor import Supervisor

_hold_hangup()
os.kill(os.getpid(), signal.SIGHUP)

async def one_process():
    stop, hangup = asyncio.Event(), asyncio.Event()
    _handle_signals(stop, hangup)
    await hangup.wait()
    print("reloads", stop.is_set())

def several_processes():
    parent = Supervisor(load(), [], None, None)
    parent._reload = lambda: print("reloads", False)
    with parent._signals():
        for key, _ in parent._selector.select():
            key.data()
"""


@pytest.mark.parametrize("kind", ["asyncio.run(one_process())", "several_processes()"])
def test_a_hangup_that_arrives_during_the_start_waits_and_reloads_then(kind: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    command = [sys.executable, "-c", f"{EARLY}\n{kind}"]
    # In a session of its own, without a terminal whose end the signal could mean.
    found = subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, start_new_session=True, check=False
    )
    assert (0, "reloads False\n") == (found.returncode, found.stdout), found.stderr


async def test_a_reload_uses_what_has_changed_and_names_what_needs_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_SECRET", SECRET)
    read = [
        load(origins=("https://a.example",), retention="1h", issuer="me"),
        load(origins=("https://a.example",), retention="1h"),
        load(max_topics=7),
    ]
    used: list[Settings] = []
    reloads = Reloads(lambda: read.pop(0), load())
    reloads.use_door = used.append
    with capture_logs() as logged:
        for _ in range(3):
            await reloads.run()
    assert [
        ("reloaded", ["ROWCAST_ORIGINS"]),
        ("reload_incomplete", ["ROWCAST_ISSUER", "ROWCAST_RETENTION"]),
        ("reload_incomplete", ["ROWCAST_RETENTION"]),
        ("reloaded", ["ROWCAST_MAX_TOPICS", "ROWCAST_ORIGINS"]),
    ] == [(line["event"], line["settings"]) for line in logged]
    assert [("https://a.example",), ()] == [settings.origins for settings in used]
    assert [load().retention] * 2 == [settings.retention for settings in used]
    assert SECRET not in str(logged)
