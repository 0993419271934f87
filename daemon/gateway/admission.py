"""Who gets a connection: the limits on their number, which one makes room for another, and the rate of each user."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Final, Generic, TypeVar

from daemon import metrics
from daemon.core.errors import ClientFault, Overloaded, TooManyConnections
from daemon.gateway.limits import Limits

ANONYMOUS: Final = ""  # the address of a peer that has none, or whose address cannot be known

Connection = TypeVar("Connection")


def address_group(host: str) -> str:
    """The addresses that one peer can choose from: the address itself for IPv4, the /64 for IPv6."""
    if ":" in host:
        address = IPv6Address(host.partition("%")[0])
        host = str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
    return sys.intern(host)  # each of its connections keeps it


class Crowd(Generic[Connection]):
    """Connections that nobody vouches for, by address, oldest first; never more than `limit`.

    When there are too many, the newcomer gets in and the oldest connection of the address that has the most gives
    way, but not in its first `grace` seconds: until then, newcomers wait in the kernel. An honest peer leaves the
    crowd sooner, so it is never sent away, however fast others come; and an address that opens connections without
    end only pushes out its own.
    """

    def __init__(self, limit: int, grace: float) -> None:
        self.limit = limit
        self._grace = grace
        self._addresses: dict[str, dict[Connection, float]] = {}  # when each connection came
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def delay(self, now: float) -> float:
        """Seconds until a newcomer can be let in; 0 or less if there is room, or one that can give way."""
        if self._size < self.limit:
            return 0.0
        return next(iter(self._addresses[self._largest()].values())) + self._grace - now

    def add(self, connection: Connection, address: str, now: float) -> Connection | None:
        """Add a connection. Returns the one that has to give way, if any."""
        oldest = None
        if self._size >= self.limit:
            largest = self._largest()
            oldest = next(iter(self._addresses[largest]))
            self.discard(oldest, largest)
        self._addresses.setdefault(address, {})[connection] = now
        self._size += 1
        return oldest

    def _largest(self) -> str:
        return max(self._addresses, key=lambda address: len(self._addresses[address]))

    def discard(self, connection: Connection, address: str) -> None:
        """Remove a connection, if it is here."""
        members = self._addresses.get(address, {})
        if connection in members:
            del members[connection]
            self._size -= 1
            if not members:
                del self._addresses[address]


class Strangers:
    """The time of the processor that connections take which nobody vouches for: all of them share one allowance.

    What an honest client has taken is given back when it is authenticated. While others have taken more than the
    allowance, newcomers wait in the kernel.
    """

    def __init__(self, limits: Limits) -> None:
        self.use(limits)
        self._used_until = 0.0

    def use(self, limits: Limits) -> None:
        """Have these limits from now on."""
        self._cpu = limits.pending_cpu
        self._burst = limits.pending_burst

    def charge(self, seconds: float, now: float) -> None:
        """Count what they took, in seconds of CPU; less than 0 gives back."""
        self._used_until = max(now, self._used_until) + seconds / self._cpu

    def delay(self, now: float) -> float:
        """Seconds until a newcomer can be let in; 0 or less if that is possible at once."""
        return self._used_until - self._burst - now


@dataclass(slots=True, eq=False)
class Turn:
    """A turn that waits; what is called when it has come."""

    callback: Callable[[], None] | None

    def cancel(self) -> None:
        """Let it not come."""
        self.callback = None


@dataclass(slots=True)
class Account:
    """What one user has: connections, bytes that they have not read, and the times until which something is used up.

    `used_until` is that of its rate and its share of the processor together, `busy_until` that of its share alone,
    and `repaid_at` is when it has paid back its credit.
    """

    user: str
    connections: int = 0
    unread: int = 0
    used_until: float = 0.0
    busy_until: float = 0.0
    repaid_at: float = 0.0
    waiting: list[Turn] = field(default_factory=list)  # few; an empty deque takes 760 bytes
    timer: asyncio.TimerHandle | None = None  # set while turns wait

    @property
    def paid_at(self) -> float:
        """The time from which on nothing is used up."""
        return max(self.used_until, self.repaid_at)


class Accounts:
    """The users that are connected, and those that left a moment ago and have used up more than their rate."""

    def __init__(self, limits: Limits) -> None:
        self.use(limits)
        self._accounts: dict[str, Account] = {}
        self._departed: set[str] = set()
        self.connections = 0

    def use(self, limits: Limits) -> None:
        """Have these limits from now on."""
        self._max_clients = limits.max_clients()
        self._max_per_user = limits.max_per_user()
        self._unread_bytes = limits.user_unread_bytes
        self._rate = limits.user_rate
        self._cpu = limits.user_cpu
        self._burst = limits.user_burst
        self._credit = limits.user_credit

    @property
    def full(self) -> bool:
        """Whether there is no place for another client."""
        return self.connections >= self._max_clients

    def enter(self, user: str) -> Account:
        """Count a connection of this user. Raises TooManyConnections or Overloaded."""
        account = self._accounts.get(user) or Account(user)
        if self.full:
            raise refused(Overloaded(), "full")
        if account.connections >= self._max_per_user:
            raise refused(TooManyConnections(), "user")
        self._accounts[user] = account
        self._departed.discard(user)
        account.connections += 1
        self.connections += 1
        return account

    def leave(self, account: Account) -> None:
        """A connection of this user has ended."""
        account.connections -= 1
        self.connections -= 1
        if not account.connections:
            self._departed.add(account.user)

    def is_too_much(self, account: Account, unread: int) -> bool:
        """Whether a connection with so many unread bytes has to go: the user has too many, and it more than most."""
        return account.unread > self._unread_bytes and unread * account.connections >= account.unread

    def charge(self, account: Account, frames: int, now: float, spent: float = 0.0) -> None:
        """Count frames towards the user's rate, or the seconds of CPU that they took towards its share.

        Whichever is more counts. CPU of less than 0 without frames gives back.
        """
        used = max(frames / self._rate, spent / self._cpu) if frames else spent / self._cpu
        account.used_until = max(now, account.used_until) + used
        account.busy_until = max(now, account.busy_until) + spent / self._cpu

    def lend(self, account: Account, spent: float, now: float) -> None:
        """Count seconds of CPU that a user takes in advance: none of its frames waits for them."""
        account.repaid_at = max(now, account.repaid_at) + spent / self._cpu

    def has_credit(self, account: Account, now: float) -> bool:
        """Whether a user may take more in advance: not while it has used up half of what it may take at once, either.

        Without that, a user with many connections, each of which asks for everything and reads nothing, would be lent
        something whenever few of them have got as far as to ask.
        """
        return account.busy_until - now <= self._burst / 2 and account.repaid_at - now <= self._credit

    def delay(self, account: Account, now: float) -> float:
        """Seconds for which the user's next frames have to wait; 0 or less if they do not."""
        return account.used_until - self._burst - now

    def wait(self, account: Account, callback: Callable[[], None]) -> Turn:
        """Call back when the user may do more, after all who have waited for longer: one timer, however many wait."""
        turn = Turn(callback)
        account.waiting.append(turn)
        if account.timer is None:
            self._set_timer(account)
        return turn

    def _set_timer(self, account: Account) -> None:
        delay = max(0.0, self.delay(account, time.monotonic()))
        account.timer = asyncio.get_running_loop().call_later(delay, self._give_turn, account)

    def _give_turn(self, account: Account) -> None:
        account.timer = None
        while account.waiting and self.delay(account, time.monotonic()) <= 0:
            callback = account.waiting.pop(0).callback
            if callback is not None:
                callback()
                break
        if account.waiting:
            self._set_timer(account)

    def forget(self, now: float) -> None:
        """Forget the users who left, unless reconnecting would give them a rate that they have used up."""
        for user in [user for user in self._departed if self._accounts[user].paid_at <= now]:
            self._departed.discard(user)
            del self._accounts[user]


class AddressCounts:
    """How many connections each address has, and how many it may have; None: any number."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._counts: Counter[str] = Counter()

    def has_room(self, address: str) -> bool:
        """Whether another connection of this address is allowed."""
        return self.limit is None or address == ANONYMOUS or self._counts[address] < self.limit

    def add(self, address: str) -> None:
        """Count a connection."""
        self._counts[address] += 1

    def remove(self, address: str) -> None:
        """A connection has ended."""
        self._counts[address] -= 1
        if not self._counts[address]:
            del self._counts[address]


def refused(fault: ClientFault, reason: str) -> ClientFault:
    """The fault, counted as a refusal."""
    metrics.REFUSED.labels(reason=reason).inc()
    return fault
