from daemon.core.change import Change, Kind, Seq, Topic
from daemon.pages.recorder import HISTORY, MAX_EVENTS, MAX_TIMED, Recorder


class Clock:
    now = 1_795_000_000.5

    def __call__(self) -> float:
        return self.now


def change(seq: int, at: str = "2026-11-18T13:46:40.480000Z") -> Change:
    return Change(Seq(seq), "1", at, "s", "messages", Topic("t"), Kind.INSERT, '{"id":1}', '{"text":"secret"}')


def recorder(clock: Clock) -> Recorder:
    return Recorder(lambda _: 3, clock)


def test_a_change_is_recorded_with_latency_and_followers_but_without_its_record() -> None:
    found = recorder(Clock())
    found.record([change(7, "2026-11-18T11:06:40.480000Z")], 3)
    [event] = found.events(0)
    assert (7, "t", "messages", "insert", 3, 20) == (
        event["seq"],
        event["topic"],
        event["table"],
        event["kind"],
        event["followers"],
        event["latency"],
    )
    assert "secret" not in str(event)


def test_clocks_that_disagree_make_no_negative_latency() -> None:
    found = recorder(Clock())
    found.record([change(7, "2027-01-01T00:00:00Z")], 3)
    assert 0 == found.events(0)[0]["latency"]


def test_each_second_has_its_own_numbers() -> None:
    clock = Clock()
    found = recorder(clock)
    found.record([change(1), change(2)], 4)
    found.record([change(3)], 1)
    clock.now += 2
    found.record([change(4)], 0)
    assert [(3, 5), (1, 0)] == [(second["changes"], second["frames"]) for second in found.seconds(0)]
    assert [1_795_000_002] == [second["at"] for second in found.seconds(1_795_000_001)]


def test_what_is_kept_is_bounded_however_much_is_published() -> None:
    clock = Clock()
    found = recorder(clock)
    for number in range(HISTORY + 10):
        clock.now += 1
        found.record([change(seq) for seq in range(1000 * number, 1000 * number + 1000)], 1)
    assert HISTORY == len(found.seconds(0))
    assert MAX_EVENTS == len(found.events(0))
    assert 1000 == found.seconds(0)[-1]["changes"]
    assert MAX_TIMED == sum(event["seq"] >= 1000 * (HISTORY + 9) for event in found.events(0))


def test_recording_begins_with_what_was_published_before() -> None:
    found = recorder(Clock())
    found.record([change(1)], 1)
    found.begin([change(5), change(6)])
    assert [6] == [event["seq"] for event in found.events(5)]
    assert [] == found.seconds(0)
    assert "latency" not in found.events(0)[0]
