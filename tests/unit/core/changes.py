"""Changes for the tests of the core."""

from daemon.core.change import Change, Kind, Seq, Topic


def a_change(seq: int, topic: str = "channel:1", kind: Kind = Kind.INSERT, **members: object) -> Change:
    facts: dict[str, object] = {
        "tx": "741",
        "at": "2026-01-10T12:00:00.123456Z",
        "schema": "chatgenius",
        "table": "messages",
        "key": '{"id":"m1"}',
        "record": '{"id":"m1","content":"hi"}',
    }
    return Change(seq=Seq(seq), topic=Topic(topic), kind=kind, **(facts | members))  # type: ignore[arg-type]
