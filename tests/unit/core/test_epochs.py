from collections.abc import Mapping

from daemon.core.batch import FRESH, Beat
from daemon.core.change import Seq
from daemon.core.epochs import LISTEN, MAX_AGE, MAX_FAILOVER, Epochs


class Gateway:
    """What reaches a gateway: each member in `epochs` beats twice a second, the age of those in `ages` apart."""

    def __init__(self) -> None:
        self.epochs, self.now = Epochs(), 100.0

    def receive(self, seconds: float, epochs: Mapping[str, str], ages: Mapping[str, float] = {}) -> list[str]:
        """The epochs that it follows meanwhile, each once in a row."""
        followed = [self.epochs.followed]
        end = self.now + seconds
        while self.now < end:
            for member, epoch in epochs.items():
                self.epochs.record(Beat(epoch, Seq(1), ages.get(member, 0.0), member, "c"), self.now)
            self.now += 0.5
            self.epochs.decide(self.now)
            if self.epochs.followed != followed[-1]:
                followed.append(self.epochs.followed)
        return followed


def test_a_gateway_follows_the_only_epoch_once_everybody_had_time_to_beat() -> None:
    gateway = Gateway()
    gateway.epochs.record(Beat("e1", Seq(1), 0.0, "a", "c"), gateway.now)
    gateway.epochs.decide(gateway.now + LISTEN - 0.1)
    assert ("", False) == (gateway.epochs.followed, gateway.epochs.has("a"))
    gateway.epochs.decide(gateway.now + LISTEN + 0.1)
    assert ("e1", True, False) == (gateway.epochs.followed, gateway.epochs.has("a"), gateway.epochs.has("b"))


def test_a_gateway_with_members_of_two_databases_from_the_start_chooses_neither() -> None:
    gateway = Gateway()
    assert [""] == gateway.receive(60.0, {"a": "e1", "b": "e2"})
    assert (True, True) == (gateway.epochs.is_mixed, gateway.epochs.cannot_begin)
    assert ["", "e2"] == gateway.receive(FRESH + 2 * LISTEN, {"b": "e2"})
    assert (False, False) == (gateway.epochs.is_mixed, gateway.epochs.cannot_begin)


def test_a_gateway_keeps_to_its_epoch_while_another_database_beats() -> None:
    gateway = Gateway()
    gateway.receive(2.0, {"a": "e1"})
    assert ["e1"] == gateway.receive(60.0, {"a": "e1", "b": "e2", "c": "e2"})
    assert (True, False) == (gateway.epochs.is_mixed, gateway.epochs.cannot_begin)
    assert (True, False) == (gateway.epochs.has("a"), gateway.epochs.has("b"))
    gateway.receive(FRESH, {"a": "e1"})
    assert not gateway.epochs.is_mixed


def test_a_gateway_keeps_to_its_epoch_also_when_it_has_received_nothing_for_a_while() -> None:
    gateway = Gateway()
    gateway.receive(2.0, {"a": "e1"})
    gateway.receive(10.0, {})
    gateway.epochs.record(Beat("e2", Seq(1), 0.0, "b", "c"), gateway.now)
    gateway.now += LISTEN / 2
    assert ["e1"] == gateway.receive(10.0, {"a": "e1", "b": "e2"})


def test_a_gateway_does_not_follow_what_has_proved_to_be_another_database_when_its_own_hangs() -> None:
    gateway = Gateway()
    gateway.receive(2.0, {"a": "e1"})
    gateway.receive(2 * MAX_FAILOVER, {"a": "e1", "b": "e2"})
    assert ["e1"] == gateway.receive(60.0, {"a": "e1", "b": "e2"}, {"a": 100.0})
    assert gateway.epochs.is_mixed


def test_a_gateway_follows_a_failover_once_no_member_is_left_behind() -> None:
    gateway = Gateway()
    gateway.receive(2.0, {"a": "e1", "b": "e1"})
    assert ["e1"] == gateway.receive(MAX_FAILOVER - 1, {"a": "e1", "b": "e2"})
    assert ["e1", "e2"] == gateway.receive(2.0, {"a": "e2", "b": "e2"})
    assert not gateway.epochs.is_mixed


def test_a_gateway_follows_a_failover_although_a_member_is_cut_off_from_the_database() -> None:
    gateway = Gateway()
    gateway.receive(2.0, {"a": "e1", "b": "e1"})
    assert ["e1"] == gateway.receive(2.0, {"a": "e1"}, {"a": MAX_AGE})
    assert ["e1", "e2"] == gateway.receive(2.0, {"a": "e1", "b": "e2"}, {"a": 2 * MAX_AGE})
    assert not gateway.epochs.is_mixed


def test_members_that_do_not_know_the_log_yet_do_not_count() -> None:
    gateway = Gateway()
    assert ["", "e1"] == gateway.receive(5.0, {"a": "e1", "b": ""})
