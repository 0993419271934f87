"""Which settings a reload changes, and what it says about the others."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.app.node import door_of, gateway_limits
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
    assert {"environment", "deflate_bytes"} == read - DOOR


def test_tls_neither_begins_nor_ends_with_a_reload() -> None:
    plain, one, two = (
        load(),
        load(tls_certificate=Path("a"), tls_key=Path("a")),
        load(tls_certificate=Path("b"), tls_key=Path("b")),
    )
    assert plain == refreshed(plain, one)
    assert one == refreshed(one, plain)
    assert two == refreshed(one, two)


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
