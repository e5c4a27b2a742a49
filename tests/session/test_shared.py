"""A pace that several clients keep together: what is stored, and who may go when."""

from __future__ import annotations

import itertools

import pytest

from smtpretry.replies.reply import Reply, Said
from smtpretry.replies.stage import Stage
from smtpretry.session.pace import Pace
from smtpretry.session.shared import SharedPace, is_probing, reserve, with_turns

SAID = Said(Stage.MAIL, Reply.parse("454 Throttling failure: Maximum sending rate exceeded."))


def found(taken: int = 20) -> SharedPace:
    """Return a pace that has found out that the server takes so many in a second."""
    pace = SharedPace(Pace())
    for number in range(taken):
        pace.let_through(100 + number / taken)
        pace.taken(100 + number / taken)
    pace.too_fast(101.0, 1.0, 100.99)
    return pace


def stored(pace: SharedPace, before: str | None = None) -> str:
    """Return what is stored when it has told its news."""
    after = pace.take_news(SAID)(before)
    assert after is not None
    return after


def test_nothing_is_told_before_a_refusal() -> None:
    """A client that was never refused has no news, and no pace to store."""
    pace = SharedPace(Pace())
    pace.let_through(1.0)
    pace.taken(1.0)
    assert not pace.has_news
    assert pace.take_news(None)(None) is None


def test_what_several_have_seen_is_what_one_would_have() -> None:
    """Refusals of the same moment count once, and what each had been let through before counts together."""
    first, second = found(4), found(6)
    both = stored(second, stored(first))
    assert SharedPace(Pace()).follow(both, (), 101.0) == SAID
    together, alone = SharedPace(Pace()), SharedPace(Pace())
    together.follow(both, (), 101.0)
    alone.follow(stored(found(10)), (), 101.0)
    assert together.rate == pytest.approx(alone.rate)
    assert together.resumes_at == alone.resumes_at == 102.0
    assert not first.has_news


def test_turns() -> None:
    """While the server wants nothing there is no turn, then one finds out, then each has its own, for whoever asks."""
    pace = stored(found())
    assert is_probing(pace)
    assert reserve(pace, 101.0, 10) == ([], 1.0)
    turns, _ = reserve(pace, 102.0, 10)
    assert turns == [102.0]
    follower = SharedPace(Pace())
    follower.follow(with_turns(pace, turns), turns, 102.0)
    assert follower.next_slot(102.0) == 102.0
    follower.let_through(102.0)
    follower.taken(102.0)
    pace = stored(follower, with_turns(pace, turns))
    assert not is_probing(pace)
    turns, wait = reserve(pace, 102.0, 10)
    assert len(turns) == 7
    assert [later - earlier for earlier, later in itertools.pairwise(turns)] == pytest.approx([1 / 19] * 6)
    assert 0 < wait < 0.1
    assert reserve(with_turns(pace, turns) or "", 102.0, 10) == ([], wait)


def test_whoever_has_no_turn_waits_for_one() -> None:
    """A client that has just asked sends nothing without a turn; one that asks no more keeps the pace by itself."""
    follower = SharedPace(Pace())
    follower.follow(stored(found()), (), 103.0)
    assert follower.next_slot(103.0) == 105.0
    assert follower.next_slot(106.0) == 106.0
    assert follower.without_turn(3) == 3
    follower.follow(None, (106.5, 106.6), 106.0)
    assert follower.without_turn(3) == 1
    assert follower.next_slot(106.0) == 106.5


def test_a_pause_takes_the_turns_that_fall_into_it() -> None:
    """Turns of a pause are not used together when it ends, be it one's own refusal or another client's."""
    own, other = SharedPace(Pace()), SharedPace(Pace())
    pace = stored(found())
    for one in (own, other):
        one.follow(pace, (102.0, 102.1, 102.9, 104.5), 102.0)
    own.let_through(102.0)
    own.too_fast(102.05, 1.0, 102.0)
    assert own.without_turn(3) == 2
    assert own.next_slot(102.05) == 104.5
    other.follow(stored(own, pace), (), 102.1)
    assert other.next_slot(102.1) == 104.5


def test_a_refused_client_that_had_nothing_taken() -> None:
    """Where the first to tell has had nothing taken before, the speed is known by what the others tell."""
    first, second = SharedPace(Pace()), found(20)
    first.too_fast(101.0, 1.0, 100.99)
    both = stored(second, stored(first))
    follower = SharedPace(Pace())
    follower.follow(both, (), 101.0)
    assert follower.rate == pytest.approx(second.rate)


def test_the_end_of_a_pause_is_told_where_no_speed_is_known() -> None:
    """A message that finds out that the server takes some again ends the pause for all: the next one begins short."""
    first = SharedPace(Pace())
    first.too_fast(101.0, 1.0, 100.99)
    pace = stored(first)
    follower = SharedPace(Pace())
    follower.follow(pace, (102.0,), 102.0)
    follower.let_through(102.0)
    follower.taken(102.0)
    assert follower.has_news
    assert follower.take_news(SAID)(pace) is None
