"""The pace: found out from the refusals alone, for every kind of limit, with one set of constants."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest

from smtpretry.session.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGES = 300
ALLOWED = 1.4  # times the ideal time
REFUSALS = 15
LATENCY = 0.004  # seconds until a command is there, and as many until its reply is


class Limit(Protocol):
    """A server's limit; `takes` counts the message where it is taken."""

    def takes(self, now: float) -> bool: ...


class Window:
    """At most `number` in any `period`: what Amazon SES is said to do, and Postfix's anvil nearly."""

    def __init__(self, number: int, period: float = 1, *, strict: bool = False) -> None:
        self.number, self.period, self.strict, self.times = number, period, strict, deque[float]()

    def takes(self, now: float) -> bool:
        while self.times and self.times[0] <= now - self.period:
            self.times.popleft()
        taken = len(self.times) < self.number
        if taken or self.strict:  # strict: a refused attempt counts as well
            self.times.append(now)
        return taken


class Counter:
    """At most `number` in each period of the server's own clock."""

    def __init__(self, number: int, period: float = 1, offset: float = 0) -> None:
        self.number, self.period, self.offset, self.epoch, self.count = number, period, offset, -1, 0

    def takes(self, now: float) -> bool:
        if (epoch := int((now + self.offset) // self.period)) != self.epoch:
            self.epoch, self.count = epoch, 0
        self.count += 1
        return self.count <= self.number


class Bucket:
    """A bucket that `rate` tokens a second drip into; with a burst of one it is a leaky bucket."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.tokens, self.at = rate, burst, float(burst), 0.0

    def takes(self, now: float) -> bool:
        self.tokens, self.at = min(self.burst, self.tokens + (now - self.at) * self.rate), now
        if self.tokens < 1 - 1e-9:
            return False
        self.tokens -= 1
        return True


class Changing:
    """One limit for the first messages, another one after them."""

    def __init__(self, number: int, first: Limit, then: Limit) -> None:
        self.left, self.first, self.then = number, first, then

    def takes(self, now: float) -> bool:
        taken = (self.first if self.left > 0 else self.then).takes(now)
        self.left -= taken
        return taken


class Punishing:
    """Who comes again too early is kept out for longer."""

    def __init__(self, limit: Limit, penalty: float) -> None:
        self.limit, self.penalty, self.until = limit, penalty, 0.0

    def takes(self, now: float) -> bool:
        if now >= self.until and self.limit.takes(now):
            return True
        self.until = now + self.penalty
        return False


class Uneven:
    """A limit behind a network that delays some messages more than others, by some milliseconds."""

    def __init__(self, limit: Limit, seed: int) -> None:
        self.limit, self.at, self.delay = limit, 0.0, random.Random(seed)  # noqa: S311 - no secret

    def takes(self, now: float) -> bool:
        self.at = max(self.at, now + self.delay.expovariate(1 / 0.003))
        return self.limit.takes(self.at)


@dataclass
class Course:
    """What became of the messages: when each was taken, and when one was refused."""

    taken: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)


def send(
    limit: Limit,
    *,
    messages: int = MESSAGES,
    connections: int = 3,
    wait: float = 1.0,
    latency: float = LATENCY,
    late: float = 0.0,
    pace: Pace | None = None,
) -> Course:
    """Send so many messages as fast as the pace lets them, over so many connections; all wait from the start."""
    pace, course, delay = pace or Pace(), Course(), random.Random(0)  # noqa: S311 - no secret
    events = list[tuple[float, int, bool, float]]()  # when a reply is there, its number, whether taken, when sent
    waiting, free, now, number = messages, connections, 0.0, 0
    while len(course.taken) < messages:
        while waiting and free > pace.probing * (connections - 1) and pace.next_slot(now) <= now:
            pace.let_through(now)
            waiting, free, number = waiting - 1, free - 1, number + 1
            taken = limit.takes(now + latency)
            (course.taken if taken else course.refused).append(now + latency)
            heapq.heappush(events, (now + 2 * latency, number, taken, now))
        slot = pace.next_slot(now) if waiting and free > pace.probing * (connections - 1) else math.inf
        if events and events[0][0] <= slot:
            now, _, taken, since = heapq.heappop(events)
            free += 1
            if taken:
                pace.taken(now)
            else:
                waiting += 1
                pace.too_fast(now, wait, since)
        else:
            now = slot + late * delay.random()
    return course


class Case(NamedTuple):
    """A limit, how long somebody who knew it would take, and the wait that its refusals ask for, in seconds."""

    limit: Callable[[], Limit]
    ideal: float
    wait: float = 1.0


FOUND = {
    "14 in any second": Case(lambda: Window(14), 21.4),
    "14 in any second, refused ones too": Case(lambda: Window(14, strict=True), 21.4),
    "14 in each second": Case(lambda: Counter(14), 21.4),
    "14 in each second, met at its end": Case(lambda: Counter(14, offset=0.95), 21.4),
    "5 in any second": Case(lambda: Window(5), 60),
    "1 in any second": Case(lambda: Window(1), 300),
    "50 in any second": Case(lambda: Window(50), 6),
    "14 a second, burst 14": Case(lambda: Bucket(14, 14), 20.4),
    "14 a second, burst 50": Case(lambda: Bucket(14, 50), 17.9),
    "14 a second, burst 200": Case(lambda: Bucket(14, 200), 7.2),
    "14 a second, half of it later": Case(lambda: Changing(150, Window(14), Window(7)), 32.1),
    "14 a second, twice that later": Case(lambda: Changing(150, Window(14), Window(28)), 16.1),
    "14 a second, burst 14, half of it later": Case(lambda: Changing(150, Bucket(14, 14), Bucket(7, 7)), 32.1),
    "14 a second, burst 14, twice that later": Case(lambda: Changing(150, Bucket(14, 14), Bucket(28, 28)), 16.1),
    "14 a second, and two seconds for who comes early": Case(lambda: Punishing(Window(14), 2), 21.4),
    "14 a second, few seconds asked for": Case(lambda: Window(14), 21.4, wait=3),
    "100 in any minute": Case(lambda: Window(100, 60), 120, wait=60),
    "100 in any minute, and nobody says so": Case(lambda: Window(100, 60), 120, wait=3),
    "100 in each minute": Case(lambda: Counter(100, 60, offset=20), 120, wait=60),
    "100 a minute, burst 100": Case(lambda: Bucket(100 / 60, 100), 120, wait=60),
    "20 in any 12 seconds": Case(lambda: Window(20, 12), 168, wait=12),
}


@pytest.mark.parametrize("latency", [0.0005, 0.004, 0.02])
@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("name", FOUND)
def test_it_finds_the_speed(name: str, connections: int, latency: float) -> None:
    """Without being told, 300 messages take at most 1.4 times the ideal time, and at most 15 are refused."""
    limit, ideal, wait = FOUND[name]
    course = send(limit(), connections=connections, latency=latency, wait=wait)
    assert max(course.taken) <= ALLOWED * max(ideal, MESSAGES * 2 * latency / connections)
    assert len(course.refused) <= REFUSALS + connections - 1  # the others were on their way at the first refusal


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FOUND)
def test_it_finds_the_speed_over_a_network(name: str, seed: int) -> None:
    """The same where neither the network nor the client's clock is even."""
    limit, ideal, wait = FOUND[name]
    course = send(Uneven(limit(), seed), wait=wait, late=0.003)
    assert max(course.taken) <= ALLOWED * ideal
    assert len(course.refused) <= REFUSALS


HARD = {  # the limits that look like stricter ones, or forgive no message that comes a little early
    "14 a second, leaky": (Case(lambda: Bucket(14, 1), 21.4), 2),
    "14 a second, burst 3": (Case(lambda: Bucket(14, 3), 21.4), 1.5),
    "100 a minute, burst 20": (Case(lambda: Bucket(100 / 60, 20), 168, wait=60), 4),
    "14 a second, and five seconds for who comes early": (Case(lambda: Punishing(Window(14), 5), 21.4), 10),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HARD)
def test_in_doubt_it_leaves_the_server_alone(name: str, seed: int) -> None:
    """Where a limit is hard to tell it takes longer, and no more messages are refused."""
    (limit, ideal, wait), times = HARD[name]
    course = send(Uneven(limit(), seed), wait=wait, late=0.003)
    assert max(course.taken) <= times * ideal
    assert len(course.refused) <= REFUSALS


def test_a_newsletter() -> None:
    """5,000 messages at 50 a second, by refusals that ask for a few seconds, take well under twice the ideal time."""
    course = send(Window(50), messages=5000, wait=3)
    assert max(course.taken) <= 1.3 * 100
    assert len(course.refused) <= REFUSALS


def test_nothing_is_paced_until_the_server_complains() -> None:
    """A server that takes everything gets everything at once."""
    pace = Pace()
    course = send(Window(10_000), messages=5000, pace=pace)
    assert max(course.taken) == pytest.approx(5000 * 2 * LATENCY / 3, rel=0.01)
    assert not pace.is_known


def test_messages_go_evenly() -> None:
    """Once the speed is known, no half second has many more messages than another."""
    taken = [at for at in send(Window(100), messages=3000).taken if at > 10]
    pairs = [after - before for before, after in itertools.pairwise(taken)]
    pauses = [gap for gap in pairs if gap > 0.1]
    assert len(pauses) <= 4
    assert max(gap for gap in pairs if gap <= 0.1) < 2 * statistics.median(pairs)
    assert min(pairs) > statistics.median(pairs) / 2


def refused(*, after: int = 14, wait: float = 1.0, patience: float = math.inf) -> Pace:
    """Return a pace that has met a refusal at 1.0, after so many messages in a tenth of a second."""
    pace = Pace(patience=patience)
    for number in range(after):
        pace.let_through(0.9)
        pace.taken(0.9 + 0.1 * number / after)
    pace.too_fast(1.0, wait, 0.95)
    return pace


def test_refusals_of_what_was_on_its_way_count_once() -> None:
    """Ten connections that are refused at once lower the speed as one does, and wait no longer."""
    pace = refused()
    before = pace.rate, pace.resumes_at
    for _ in range(9):
        assert pace.too_fast(1.1, 1.0, 0.95) == pace.resumes_at
    assert (pace.rate, pace.resumes_at) == before


def test_the_wait_grows_while_nothing_is_taken() -> None:
    """Each wait is twice the one before, up to a quarter of an hour, but a minute after the first refusal it asks too."""
    pace, waits = refused(), list[float]()
    for _ in range(12):
        now = pace.resumes_at
        waits.append(pace.too_fast(now, 1.0, now) - now)
    assert waits == [2, 4, 8, 16, 29, 64, 128, 256, 512, 900, 900, 900]
    now = pace.resumes_at
    pace.taken(now)
    assert pace.too_fast(now + 1, 1.0, now + 0.5) == now + 2


def test_a_long_wait_is_not_shortened() -> None:
    """A server that asks for an hour gets an hour."""
    assert refused(wait=3600).resumes_at == 1.0 + 3600


def test_the_last_is_tried_when_the_patience_ends() -> None:
    """No wait that has grown leads beyond the patience; one that the server names does."""
    pace = refused(wait=600, patience=3600)
    while pace.resumes_at < 3600:
        pace.too_fast(pace.resumes_at, 600, pace.resumes_at)
    assert pace.resumes_at == 3601
    pace = refused(wait=600, patience=1000)
    assert pace.too_fast(601, 600, 601, named=True) == 601 + 900


def test_one_goes_first() -> None:
    """After a refusal a single message finds out whether the server takes any again."""
    pace = refused()
    assert pace.probing
    pace.let_through(pace.resumes_at)
    pace.taken(pace.resumes_at)
    assert not pace.probing


def test_a_quiet_client_learns_nothing() -> None:
    """Messages that come more slowly than the pace lets them do not raise it, however many are taken."""
    pace = refused()
    pace.taken(pace.resumes_at)
    rate = pace.rate
    for number in range(1000):
        now = 10.0 + number
        assert pace.next_slot(now) == now
        pace.let_through(now)
        pace.taken(now)
    assert pace.rate == rate


def test_a_refusal_before_anything_was_taken() -> None:
    """Where another process has used the limit up, the client waits, and finds the speed from what is taken then."""

    class UsedUp(Window):
        def takes(self, now: float) -> bool:
            return now > 0.5 and super().takes(now)

    course = send(UsedUp(14))
    assert max(course.taken) <= ALLOWED * 21.4


def test_the_last_burst_tells_not_the_average() -> None:
    """After an hour of a message every ten seconds, a burst that is refused still tells the speed of a second."""
    pace = Pace()
    for number in range(360):
        pace.taken(10.0 * number)
    for number in range(14):
        pace.taken(3600 + number / 1000)
    pace.too_fast(3600.1, 1.0, 3600.05)
    assert pace.rate == pytest.approx(14, rel=0.1)


def test_it_takes_the_same_time_for_each_message() -> None:
    """What it holds does not grow with the messages."""
    pace = Pace()
    for number in range(20_000):
        pace.let_through(number / 100)
        pace.taken(number / 100)
    assert len(pace._recent) <= 1000


@pytest.mark.parametrize(("wait", "rate", "period"), [(60, 100 / 60, 60), (1, 0.95 * 100, 1)])
def test_what_was_on_its_way_at_the_first_refusal_is_measured(wait: float, rate: float, period: float) -> None:
    """The server took it before it refused, whichever answer came first; a later refusal measures nothing."""
    pace = Pace()
    for _ in range(97):
        pace.taken(0.5)
    pace.too_fast(0.6, wait, 0.1)
    for _ in range(3):
        pace.taken(0.7)
    assert (pace.rate, pace.period) == pytest.approx((rate, period))
    pace.taken(100)
    pace.too_fast(101, wait, 100.5)
    lowered = pace.rate
    pace.taken(101.1)
    assert pace.rate == lowered
