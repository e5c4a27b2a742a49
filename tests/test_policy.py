"""What a policy decides, how long it waits and when it gives up: as a plain value, and carried out by a client."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
import math
import pickle
import pydoc
import subprocess
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import tenacity
import virtual
from support import ANN, APP, BOB, BODY, CAT, GREYLISTED, LOG_IN, PASSWORD, USER, patient, talk, virtually

from smtpretry import DEFAULT_RULES, NO_REPLY, Action, Decision, Delivery, Reply, RetryPolicy, Rule, Scope, Stage
from smtpretry.testing import no_wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from smtpretry import RetryingSMTP
    from smtpretry.testing import ScriptedServer

LATER = Reply.parse("450 4.2.0 later")
NEVER = Reply.parse("550 5.7.1 never")
SILENCE = Reply(NO_REPLY, text="Connection lost")


async def waits_of(policy: RetryPolicy, reply: str = "450 4.2.0 later", stage: str = "RCPT") -> list[float]:
    """How long a client with this policy waits between its attempts, where the server always says so."""
    async with talk(policy) as (server, smtp):
        server.on(stage, reply)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert [*delivery.refused] == [ANN]
        assert server.messages == []
        return waits(delivery)


def waits(delivery: Delivery) -> list[float]:
    """The seconds between the attempts."""
    return [later.at - earlier.at for earlier, later in itertools.pairwise(delivery.attempts)]


# Deciding


@pytest.mark.parametrize(
    ("reply", "stage", "action", "scope"),
    [
        (LATER, Stage.RCPT, Action.RETRY, Scope.RECIPIENT),
        (LATER, Stage.MAIL, Action.RETRY, Scope.MESSAGE),
        (LATER, Stage.END_OF_DATA, Action.RETRY, Scope.MESSAGE),
        (LATER, Stage.CONNECT, Action.RETRY, Scope.SERVER),
        (NEVER, Stage.RCPT, Action.FAIL, Scope.RECIPIENT),
        (NEVER, Stage.MAIL, Action.FAIL, Scope.MESSAGE),
        (NEVER, Stage.DATA, Action.FAIL, Scope.MESSAGE),
        (NEVER, Stage.CONNECT, Action.FAIL, Scope.SERVER),
        (Reply(530, "5.7.0", "Authentication required"), Stage.MAIL, Action.AUTHENTICATE, Scope.MESSAGE),
        (Reply(421, None, "bye"), Stage.RCPT, Action.RECONNECT, Scope.RECIPIENT),
        (SILENCE, Stage.DATA, Action.RECONNECT, Scope.MESSAGE),
        (Reply(452, "4.5.3", "too many recipients"), Stage.RCPT, Action.SPLIT, Scope.RECIPIENT),
    ],
)
def test_decides_what_a_reply_means(reply: Reply, stage: Stage, action: Action, scope: Scope) -> None:
    """`decide` gives the action and whom it concerns, from the reply and its stage."""
    decision = RetryPolicy().decide(reply, stage)
    assert isinstance(decision, Decision)
    assert (decision.action, decision.scope) == (action, scope)


def test_decides_as_in_the_readme() -> None:
    """The greylisting example of the public face: RETRY, for the recipient, in 300 seconds, by a row that says why."""
    decision = RetryPolicy().decide(Reply.parse("450 4.2.0 Greylisted for 300 seconds"), Stage.RCPT)
    assert (decision.action, decision.scope, decision.wait) == (Action.RETRY, Scope.RECIPIENT, 300.0)
    assert "reylist" in decision.rule.why


@pytest.mark.parametrize("code", range(400, 500))
def test_any_4xx_is_for_now_without_rules(code: int) -> None:
    """Where no row matches, a 4xx is tried again, also by a policy without rules."""
    assert RetryPolicy(rules=()).decide(Reply(code), Stage.RCPT).action is Action.RETRY


@pytest.mark.parametrize("code", [*range(500, 600), 250, 354])
def test_anything_else_is_final_without_rules(code: int) -> None:
    """Where no row matches, a 5xx is final."""
    assert RetryPolicy(rules=()).decide(Reply(code), Stage.RCPT).action is Action.FAIL


def test_silence_reconnects_without_rules() -> None:
    """Where no row matches, silence is answered by a new connection."""
    assert RetryPolicy(rules=()).decide(SILENCE, Stage.MAIL).action is Action.RECONNECT


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize(
    "rule", [*DEFAULT_RULES, *(Rule(action=action) for action in Action)], ids=lambda rule: rule.action.name
)
def test_never_decides_what_the_session_cannot_do(rule: Rule, stage: Stage) -> None:
    """Given what the session is able to do, no row yields another action than that, or RETRY, RECONNECT and FAIL."""
    able = {Action.RETRY, Action.FAIL}
    policy = RetryPolicy(
        rules=(dataclasses.replace(rule, code=None, enhanced=None, text=None, unless=None, stages=None, token=False),)
    )
    for reply in (LATER, NEVER, Reply(530), Reply(535), Reply(421), SILENCE):
        decision = policy.decide(reply, stage, able=able, token=True)
        if rule.action is Action.RECONNECT:
            assert decision.action in (Action.RETRY, Action.FAIL, Action.RECONNECT)
        else:
            assert decision.action in {*able, rule.otherwise}


@pytest.mark.parametrize("otherwise", [Action.RETRY, Action.RECONNECT, Action.FAIL])
@pytest.mark.parametrize("code", [450, 550])
def test_falls_to_the_rows_otherwise(code: int, otherwise: Action) -> None:
    """A row whose action is not possible means its `otherwise`."""
    policy = RetryPolicy(rules=(Rule(action=Action.AUTHENTICATE, otherwise=otherwise),))
    decision = policy.decide(Reply(code), Stage.MAIL, able={Action.RETRY, Action.RECONNECT, Action.FAIL})
    assert decision.action is otherwise
    assert decision.rule.action is Action.AUTHENTICATE


@pytest.mark.parametrize(("code", "action"), [(450, Action.RETRY), (550, Action.FAIL), (530, Action.FAIL)])
def test_falls_by_the_code_without_an_otherwise(code: int, action: Action) -> None:
    """A row without `otherwise` means FAIL for a 5xx and RETRY for a 4xx, where its action is not possible."""
    policy = RetryPolicy(rules=(Rule(action=Action.AUTHENTICATE),))
    assert policy.decide(Reply(code), Stage.MAIL, able={Action.RETRY, Action.FAIL}).action is action


def test_own_rules_come_first() -> None:
    """The first row that matches wins, so one's own rows in front override the table, and only where they match."""
    mine = Rule(code=550, text=r"too many emails per second", action=Action.RETRY, wait=5)
    policy = RetryPolicy(rules=(mine, *DEFAULT_RULES))
    assert policy.decide(Reply.parse("550 5.7.0 Too many emails per second"), Stage.MAIL).rule is mine
    assert policy.decide(NEVER, Stage.MAIL).action is Action.FAIL
    swapped = RetryPolicy(rules=(*DEFAULT_RULES, mine))
    assert (
        swapped.decide(Reply.parse("550 5.1.1 no such user: too many emails per second"), Stage.MAIL).rule is not mine
    )


def test_deciding_changes_nothing() -> None:
    """A policy is a frozen value: equal policies decide alike, however often, and none can be changed."""
    policy = RetryPolicy(wait=tenacity.wait_fixed(60))
    assert [policy.decide(LATER, Stage.RCPT) for _ in range(3)] == [policy.decide(LATER, Stage.RCPT)] * 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.max_attempts = 7  # type: ignore[misc]


# The wait and the patience of a row


def row_waits(policy: RetryPolicy, attempts: int, reply: Reply = LATER) -> list[float]:
    """The waits after so many attempts, as far as the policy is patient."""
    return [policy.decide(reply, Stage.RCPT, attempt=number).wait for number in range(1, attempts + 1)]


@pytest.mark.parametrize(
    ("wait", "backoff", "expected"),
    [
        (1, tenacity.wait_fixed(60), [1, 2, 4, 8, 16, 32]),
        (1, tenacity.wait_fixed(0), [1, 2, 4, 8, 16, 32]),
        (0.5, tenacity.wait_fixed(60), [0.5, 1, 2, 4]),
        (5, tenacity.wait_exponential(multiplier=60, max=900), [5, 10, 20, 40, 80, 160, 320, 640, 900, 900]),
        (600, tenacity.wait_exponential(multiplier=60, max=900), [600, 900, 900]),
        (900, tenacity.wait_fixed(60), [900, 900, 900]),
        (900, tenacity.wait_fixed(7200), [900, 1800, 3600, 7200, 7200]),
        (1200, tenacity.wait_fixed(60), [1200, 1200]),
        (7200, tenacity.wait_fixed(1), [7200, 7200]),
    ],
)
def test_a_rows_wait_is_the_wait(wait: float, backoff: Any, expected: list[float]) -> None:
    """It wins over the policy's, shorter or longer, and doubles up to 15 minutes or the policy's wait."""
    policy = RetryPolicy(rules=(Rule(code=450, action=Action.RETRY, wait=wait),), wait=backoff, give_up_after=None)
    assert row_waits(policy, len(expected)) == expected
    assert policy.decide(Reply(451), Stage.RCPT).wait == backoff(policy._state(attempt=1, elapsed=0))


def test_a_rows_wait_stays_finite() -> None:
    """After a million refusals it is what it was after twenty."""
    policy = RetryPolicy(rules=(Rule(action=Action.RETRY, wait=1),), give_up_after=None)
    assert policy.decide(LATER, Stage.RCPT, attempt=1_000_000).wait <= 906


def test_a_delay_that_the_server_names_wins_over_the_rows_wait() -> None:
    """The server knows best, for three attempts; then the backoff where that is longer."""
    policy = RetryPolicy(rules=(Rule(action=Action.RETRY, wait=5),), wait=tenacity.wait_fixed(100), give_up_after=None)
    assert row_waits(policy, 4, Reply(450, None, "try again in 30 seconds")) == [30, 30, 30, 100]


def test_a_rows_wait_beyond_the_deadline_gives_way_to_the_backoff() -> None:
    """A row that waits for longer than the policy is patient does not end the delivery before its time."""
    policy = RetryPolicy.interactive(rules=(Rule(action=Action.RETRY, wait=600),))
    assert policy.decide(LATER, Stage.RCPT).wait == pytest.approx(1.25, abs=0.3)


@virtually
async def test_a_rate_per_second_is_waited_for_in_seconds() -> None:
    """An application's rule with wait=1 gets a message through a limit per second in seconds, not in minutes."""
    mine = Rule(name="per-second", code=451, action=Action.RETRY, scope=Scope.SERVER, slower=True, wait=1)
    async with talk(patient(rules=(mine, *DEFAULT_RULES))) as (server, smtp):
        server.on("MAIL", "451 4.7.0 enough for this second", times=2)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert waits(delivery) == [pytest.approx(wait, abs=0.1) for wait in (1, 2)]


def test_a_row_may_be_less_patient_than_the_policy() -> None:
    """Its limit counts where it is shorter: the last attempt falls on it, and none comes after it."""
    hasty = Rule(code=450, action=Action.RETRY, patience=600)
    policy = RetryPolicy(rules=(hasty,), wait=tenacity.wait_fixed(450), give_up_after=timedelta(hours=1))
    assert policy.decide(LATER, Stage.RCPT, attempt=2, elapsed=450).wait == 150
    assert not policy.gives_up(attempt=2, elapsed=450, wait=150, rule=hasty)
    assert policy.gives_up(attempt=3, elapsed=600, wait=1, rule=hasty)
    assert not policy.gives_up(attempt=3, elapsed=600, wait=1)
    longer = dataclasses.replace(hasty, patience=7200)
    assert policy.gives_up(attempt=3, elapsed=3600, wait=1, rule=longer)


def test_no_limit_of_the_policys_leaves_the_rows_own() -> None:
    """With give_up_after=None a row's patience still ends it."""
    hasty = Rule(code=450, action=Action.RETRY, patience=600)
    policy = RetryPolicy(rules=(hasty,), give_up_after=None)
    assert policy.gives_up(attempt=9, elapsed=601, wait=1, rule=hasty)
    assert policy.patience == math.inf


@virtually
async def test_an_own_rule_is_carried_out() -> None:
    """A 550 that the application's own row calls transient is sent again after that row's wait."""
    mine = Rule(code=550, text=r"per second", action=Action.RETRY, wait=120)
    async with talk(patient(rules=(mine, *DEFAULT_RULES))) as (server, smtp):
        server.on("RCPT", BOB, "550 5.7.0 Too many emails per second", times=1)
        server.on("RCPT", CAT, "550 5.1.1 unknown")
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert delivery.accepted == [ANN, BOB]
        assert [*delivery.refused] == [CAT]
        assert waits(delivery) == [pytest.approx(120, abs=0.1)]


@virtually
async def test_an_own_rule_can_make_a_4xx_final() -> None:
    """A row that says FAIL ends a delivery at a 4xx, for the recipient only."""
    async with talk(patient(rules=(Rule(code=450, action=Action.FAIL), *DEFAULT_RULES))) as (server, smtp):
        server.on("RCPT", BOB, GREYLISTED, times=1)
        errors, _ = await smtp.sendmail(APP, [ANN, BOB], BODY)
        assert [*errors] == [BOB]


@virtually
async def test_an_own_rule_can_make_a_recipients_reply_the_servers() -> None:
    """A row with scope=SERVER makes every send of the client wait for what was said to one recipient."""
    mine = Rule(code=450, action=Action.RETRY, scope=Scope.SERVER, wait=300)
    async with talk(patient(rules=(mine, *DEFAULT_RULES))) as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED, times=1)
        first = asyncio.create_task(smtp.deliver(BODY, sender=APP, recipients=[ANN]))
        await asyncio.sleep(1)
        await smtp.deliver(BODY, sender=APP, recipients=[BOB])
        assert virtual.clock() - virtual.EPOCH >= 300
        assert (await first).accepted == [ANN]


@virtually
async def test_an_own_rule_that_wants_a_new_connection_gets_one() -> None:
    """A row that says RECONNECT with wait=0 goes on at once over a new connection, once a pass."""
    mine = Rule(code=450, action=Action.RECONNECT, wait=0)
    async with talk(patient(rules=(mine,))) as (server, smtp):
        server.on("MAIL", "450 not here", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert server.connections == 2
        assert len(delivery.attempts) == 1
        server.on("MAIL", "450 not here", times=2)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[BOB])
        assert delivery.accepted == [BOB]
        assert len(delivery.attempts) == 2


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "END_OF_DATA"])
@virtually
async def test_no_rule_makes_a_send_run_for_ever(stage: str, action: Action) -> None:
    """Whatever a policy's row says to a reply that never changes, at whatever stage, the delivery ends."""
    looks = itertools.count()

    def clock() -> float:
        assert next(looks) < 2000, "it runs in circles"
        return virtual.clock()

    rule = Rule(action=action, wait=0 if action in (Action.RETRY, Action.RECONNECT) else None)
    policy = patient(rules=(rule,), max_attempts=5, clock=clock)
    mine = {"username": USER, "password": PASSWORD}
    async with talk(
        policy, auth=(USER, PASSWORD), auth_required=False, tls=True, client={"start_tls": False}, credentials=mine
    ) as (
        server,
        smtp,
    ):
        server.on(stage, "451 for ever", close=False)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert delivery.pending == []
        assert sorted(delivery.refused) == [ANN, BOB, CAT]
        assert server.connections < 50
        assert server.messages == []


# Waiting


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (tenacity.wait_fixed(7), [7, 7, 7, 7]),
        (tenacity.wait_fixed(timedelta(minutes=2)), [120, 120, 120, 120]),
        (tenacity.wait_incrementing(start=10, increment=5), [10, 15, 20, 25]),
        (tenacity.wait_exponential(multiplier=10, max=50), [10, 20, 40, 50]),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(2), tenacity.wait_fixed(30)), [1, 2, 30, 30]),
        (tenacity.wait_fixed(3) + tenacity.wait_fixed(4), [7, 7, 7, 7]),
        (tenacity.wait_combine(tenacity.wait_fixed(5), tenacity.wait_incrementing(1, 1)), [6, 7, 8, 9]),
        (lambda state: 100 * state.attempt_number, [100, 200, 300, 400]),
    ],
)
@virtually
async def test_any_tenacity_wait_can_be_given(wait: Any, expected: list[float]) -> None:
    """The waits between the attempts are those that the tenacity object computes, by the number of the attempt."""
    assert await waits_of(patient(wait=wait, max_attempts=5)) == [
        pytest.approx(seconds, abs=0.05) for seconds in expected
    ]


@pytest.mark.parametrize(
    "wait",
    [
        tenacity.wait_random(10, 20),
        tenacity.wait_random_exponential(multiplier=10, max=20, min=10),
        tenacity.wait_fixed(9) + tenacity.wait_exponential_jitter(max=11, jitter=1),
    ],
)
@virtually
async def test_random_tenacity_waits_can_be_given(wait: Any) -> None:
    """Waits with jitter stay within what tenacity was told."""
    for seconds in await waits_of(patient(wait=wait, max_attempts=5)):
        assert 10 <= seconds <= 20.05


@virtually
async def test_a_wait_may_look_at_the_error() -> None:
    """A tenacity wait that goes by the exception gets one."""
    seen = list[BaseException]()

    class ByError(tenacity.wait.wait_base):
        def __call__(self, retry_state: tenacity.RetryCallState) -> float:
            assert retry_state.outcome is not None
            error = retry_state.outcome.exception()
            assert error is not None
            seen.append(error)
            return 5

    policy = patient(wait=ByError(), max_attempts=2)
    seen.clear()
    await waits_of(policy)
    assert all(isinstance(error, BaseException) for error in seen)
    assert seen


@virtually
async def test_one_policy_for_many_sends_counts_each_for_itself() -> None:
    """Fifty sends at once with one policy object have fifty counts: their waits do not mix."""
    async with talk(patient(wait=tenacity.wait_incrementing(10, 10), max_attempts=4)) as (server, smtp):
        people = [f"p{number}@example.com" for number in range(50)]
        for number, who in enumerate(people):
            server.on("RCPT", who, GREYLISTED, times=1 + number % 3)
        deliveries = await asyncio.gather(*[smtp.deliver(BODY, sender=APP, recipients=[who]) for who in people])
        for number, delivery in enumerate(deliveries):
            assert waits(delivery) == [pytest.approx(wait, abs=0.1) for wait in (10, 20, 30)[: 1 + number % 3]]


@virtually
async def test_each_recipient_counts_for_itself() -> None:
    """Recipients that are refused at different times have counts of their own."""
    async with talk(patient(wait=tenacity.wait_fixed(60), max_attempts=2), max_recipients=None) as (server, smtp):
        server.on("RCPT", ANN, GREYLISTED)
        server.on("RCPT", BOB, "450 Greylisted for 10 seconds", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB, CAT])
        assert delivery.accepted == [BOB, CAT]
        assert {who: outcome.attempts for who, outcome in delivery.outcomes.items()} == {ANN: 2, BOB: 2, CAT: 1}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Greylisted for 300 seconds", 300),
        ("Greylisted, please try again in 5 minutes", 300),
        ("Try again in 00:02:00", 120),
        ("please retry after 90 s", 90),
        ("come back in half an hour", 1800),
    ],
)
@virtually
async def test_a_sane_delay_that_the_server_names_is_waited(text: str, seconds: float) -> None:
    """The server's own delay replaces the computed one, longer or shorter."""
    async with talk(patient(wait=tenacity.wait_fixed(1000))) as (server, smtp):
        server.on("RCPT", f"450 4.2.0 {text}", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert waits(delivery) == [pytest.approx(seconds, abs=0.1)]


@pytest.mark.parametrize(
    "text",
    [
        "try again in 0 seconds",
        "try again in 99999999 days",
        "try again in -5 seconds",
        "limit is 10 messages per hour",
        "Greylisted, see https://example.com/300-seconds",
    ],
)
@virtually
async def test_an_insane_delay_is_no_delay(text: str) -> None:
    """Zero, a year, a limit or a link is no delay: the computed wait holds."""
    async with talk(patient(wait=tenacity.wait_fixed(77), max_attempts=2)) as (server, smtp):
        server.on("RCPT", f"450 4.2.0 {text}", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert waits(delivery)[0] >= 76.9


@virtually
async def test_a_named_delay_beyond_the_deadline_ends_the_wait_at_once() -> None:
    """Where the server wants to be left alone for longer than the policy's patience, the send fails now, not then."""
    async with talk(patient(give_up_after=timedelta(minutes=10))) as (server, smtp):
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 3000 seconds")
        errors, _ = await smtp.sendmail(APP, [ANN, BOB], BODY)
        assert errors == {ANN: (450, "4.2.0 Greylisted for 3000 seconds")}
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_a_named_delay_beyond_what_is_left_ends_the_wait_at_once() -> None:
    """The deadline counts from the first attempt: what fits at first does not fit later."""
    async with talk(patient(give_up_after=timedelta(minutes=10))) as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted for 400 seconds")
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert waits(delivery) == [pytest.approx(400, abs=0.1)]
        assert virtual.clock() - virtual.EPOCH == pytest.approx(400, abs=0.1)


# Giving up


@pytest.mark.parametrize(
    ("stop", "attempts"),
    [
        (tenacity.stop_after_attempt(3), 3),
        (tenacity.stop_after_delay(100), 3),
        (tenacity.stop_after_delay(timedelta(seconds=100)), 3),
        (tenacity.stop_before_delay(100), 2),
        (tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(100), 3),
        (tenacity.stop_after_attempt(5) & tenacity.stop_after_delay(100), 5),
        (tenacity.stop_any(tenacity.stop_after_attempt(2), tenacity.stop_never), 2),
        (lambda state: state.attempt_number >= 4, 4),
    ],
)
@virtually
async def test_any_tenacity_stop_can_be_given(stop: Any, attempts: int) -> None:
    """The attempts end where the tenacity object says so."""
    waited = await waits_of(patient(wait=tenacity.wait_fixed(60), stop=stop))
    assert len(waited) == attempts - 1


@pytest.mark.parametrize("limit", [1, 2, 5])
@virtually
async def test_max_attempts_is_the_number_of_attempts(limit: int) -> None:
    """`max_attempts` attempts are made, and no more."""
    async with talk(patient(max_attempts=limit, give_up_after=None)) as (server, smtp):
        server.on("MAIL", "451 4.3.0 later")
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert len(delivery.attempts) == server.verbs.count("MAIL") == limit


@pytest.mark.parametrize("minutes", [1, 5, 47, 600])
@virtually
async def test_give_up_after_is_how_long_it_is_tried(minutes: int) -> None:
    """The last attempt falls on the deadline, none comes after it, and nothing is waited for in vain."""
    policy = patient(give_up_after=timedelta(minutes=minutes), wait=tenacity.wait_fixed(45))
    waited = await waits_of(policy)
    assert sum(waited) == pytest.approx(minutes * 60, abs=1)
    assert sum(waited) <= minutes * 60 + 0.5
    assert all(wait <= 45.1 for wait in waited)
    assert virtual.clock() - virtual.EPOCH == pytest.approx(sum(waited), abs=1)


@virtually
async def test_without_limits_it_is_tried_until_it_works() -> None:
    """With give_up_after=None and no other limit, a server that is down for a week is waited for."""
    async with talk(patient(give_up_after=None)) as (server, smtp):
        server.on("RCPT", "450 later", times=700)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert virtual.clock() - virtual.EPOCH > 7 * 86400 - 60_000


@virtually
async def test_give_up_after_holds_for_a_broken_server_too() -> None:
    """Time-outs and drops end with the deadline as well."""
    async with talk(patient(give_up_after=timedelta(minutes=10))) as (server, smtp):
        server.fail_at("MAIL", "stall")
        with pytest.raises(aiosmtplib.SMTPReadTimeoutError):
            await smtp.sendmail(APP, [ANN], BODY)
        assert 600 <= virtual.clock() - virtual.EPOCH <= 600 + 61


@virtually
async def test_interactive_is_for_a_request_handler() -> None:
    """RetryPolicy.interactive() waits seconds, and half a minute in all."""
    policy = dataclasses.replace(RetryPolicy.interactive(), clock=virtual.clock)
    waited = await waits_of(policy)
    assert sum(waited) == pytest.approx(30, abs=0.5)
    assert [round(wait) for wait in waited[:3]] in ([1, 2, 4], [1, 2, 5], [2, 2, 4], [2, 2, 5], [1, 3, 4], [2, 3, 4])
    assert max(waited) <= 8.6


@pytest.mark.parametrize("reply", ["450 4.2.0 Greylisted for 300 seconds", "421 4.3.2 Service shutting down, busy"])
@virtually
async def test_interactive_never_keeps_a_request_waiting(reply: str) -> None:
    """With interactive(), no reply keeps a send for longer than half a minute."""
    async with talk(dataclasses.replace(RetryPolicy.interactive(), clock=virtual.clock)) as (server, smtp):
        server.on("RCPT", reply)
        with pytest.raises(aiosmtplib.SMTPException):
            await smtp.sendmail(APP, [ANN], BODY)
        assert virtual.clock() - virtual.EPOCH <= 31


@pytest.mark.parametrize("make", [RetryPolicy.interactive, RetryPolicy.queue])
def test_a_ready_made_policy_takes_overrides(make: Any) -> None:
    """Any field can be another, and the rest stays as it was made; what is no field is a TypeError."""
    rules = (Rule(action=Action.FAIL),)
    policy = make(give_up_after=timedelta(minutes=7), rules=rules, max_attempts=3, on_uncertain="raise")
    assert (policy.give_up_after, policy.rules, policy.max_attempts) == (timedelta(minutes=7), rules, 3)
    assert policy.on_uncertain == "raise"
    assert policy.backoff(attempt=1, elapsed=0) == pytest.approx(make().backoff(attempt=1, elapsed=0), rel=0.5)
    assert make(wait=tenacity.wait_fixed(5)).backoff(attempt=3, elapsed=0) == 5
    assert make(give_up_after=None).patience == math.inf
    with pytest.raises(ValueError, match="positive timedelta"):
        make(give_up_after=timedelta(0))
    with pytest.raises(TypeError, match="patience"):
        make(patience=5)


def test_the_help_fits_on_two_screens() -> None:
    """`help(RetryPolicy)` names the table in place of showing it."""
    shown = pydoc.plain(pydoc.render_doc(RetryPolicy))
    assert "= DEFAULT_RULES" in shown
    assert len(shown.splitlines()) < (140 if sys.version_info < (3, 13) else 190)  # which has a line for each parameter
    assert max(map(len, shown.splitlines())) < 700
    assert repr(DEFAULT_RULES) == "DEFAULT_RULES"
    assert repr((*DEFAULT_RULES,)[:1]).startswith("(Rule(")


def test_interactive_is_of_the_class_it_is_asked_of() -> None:
    """A subclass of RetryPolicy has an interactive() of its own kind, and the default is patient."""

    class Mine(RetryPolicy):
        pass

    assert type(Mine.interactive()) is Mine
    assert RetryPolicy().give_up_after == timedelta(hours=1)
    assert RetryPolicy.interactive().give_up_after == timedelta(seconds=30)
    assert RetryPolicy() == RetryPolicy()
    assert RetryPolicy() != RetryPolicy.interactive()


# A server that says "not now"


@virtually
async def test_a_server_that_says_not_now_says_it_to_all() -> None:
    """While the server is busy, no other send of the same client bothers it, and all go through afterwards."""
    async with talk() as (server, smtp):
        server.on("CONNECT", "421 4.3.2 too many connections, try again in 120 seconds", times=1)
        sends = [
            asyncio.create_task(smtp.deliver(BODY, sender=APP, recipients=[f"p{n}@example.com"])) for n in range(10)
        ]
        await asyncio.sleep(100)
        assert server.connections == 1
        deliveries = await asyncio.gather(*sends)
        assert all(delivery.accepted for delivery in deliveries)
        assert server.connections == 2


@virtually
async def test_a_pause_of_the_server_grows_and_ends() -> None:
    """A server that is down again and again is asked more and more rarely; once it works, all is as before."""
    async with talk(patient(wait=tenacity.wait_incrementing(100, 100))) as (server, smtp):
        server.on("CONNECT", "450 busy", times=3)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert waits(delivery) == [pytest.approx(wait, abs=0.1) for wait in (100, 200, 300)]
        server.disconnect()
        server.on("CONNECT", "450 busy", times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[BOB])
        assert waits(delivery) == [pytest.approx(100, abs=0.1)]


@virtually
async def test_an_impatient_send_does_not_wait_for_a_server_that_pauses_for_longer() -> None:
    """A send whose deadline lies before the end of the server's pause ends at once, with what the server said."""
    async with talk(patient(give_up_after=timedelta(seconds=100))) as (server, smtp):
        server.on("CONNECT", "421 4.3.2 busy, try again in 90 seconds", times=1)
        first = asyncio.create_task(smtp.deliver(BODY, sender=APP, recipients=[ANN]))
        await asyncio.sleep(1)
        second = await smtp.deliver(BODY, sender=APP, recipients=[BOB])
        assert second.accepted == (await first).accepted or second.accepted == [BOB]
        assert virtual.clock() - virtual.EPOCH == pytest.approx(90, abs=1)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"wait": -1}, ValueError),
        ({"wait": -0.5}, ValueError),
        ({"wait": tenacity.wait_fixed(-1)}, ValueError),
        ({"wait": tenacity.wait_fixed(math.nan)}, ValueError),
        ({"wait": tenacity.wait_fixed(-5) + tenacity.wait_fixed(1)}, ValueError),
        ({"wait": lambda state: -1}, ValueError),
        ({"wait": 60}, TypeError),
        ({"wait": "60"}, TypeError),
        ({"wait": None}, TypeError),
        ({"wait": lambda state: None}, TypeError),
        ({"stop": 5}, TypeError),
        ({"stop": "never"}, TypeError),
        ({"give_up_after": timedelta(0)}, ValueError),
        ({"give_up_after": timedelta(seconds=-1)}, ValueError),
        ({"give_up_after": 3600}, TypeError),
        ({"give_up_after": "1h"}, TypeError),
        ({"max_attempts": 0}, ValueError),
        ({"max_attempts": -1}, ValueError),
        ({"max_attempts": 1.5}, TypeError),
        ({"max_attempts": "3"}, TypeError),
        ({"on_uncertain": "perhaps"}, ValueError),
        ({"on_uncertain": None}, ValueError),
        ({"rules": [Rule(action=Action.FAIL), "550"]}, TypeError),
        ({"rules": Rule(action=Action.FAIL)}, TypeError),
        ({"rules": 5}, TypeError),
        ({"rules": None}, TypeError),
        ({"rules": "RETRY"}, TypeError),
    ],
)
def test_a_policy_that_cannot_work_is_refused_at_once(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A negative wait and its like are a ValueError, another type a TypeError, when the policy is made."""
    with pytest.raises(error, match=r"\w"):
        RetryPolicy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"code": ()}, ValueError),
        ({"code": range(0)}, ValueError),
        ({"code": 99}, ValueError),
        ({"code": 600}, ValueError),
        ({"code": range(400, 700)}, ValueError),
        ({"enhanced": "9.1.1"}, ValueError),
        ({"enhanced": "4.2"}, ValueError),
        ({"enhanced": ()}, ValueError),
        ({"text": "("}, ValueError),
        ({"text": ""}, ValueError),
        ({"stages": []}, ValueError),
        ({"wait": -1}, ValueError),
        ({"wait": math.inf}, ValueError),
        ({"code": NO_REPLY, "enhanced": "4.2.0"}, ValueError),
        ({"text": "x", "unless": "x"}, ValueError),
        ({"otherwise": Action.AUTHENTICATE}, ValueError),
        ({"action": "RETRY"}, TypeError),
        ({"code": "450"}, TypeError),
        ({"code": [450]}, TypeError),
        ({"stages": ["RCPT"]}, TypeError),
        ({"stages": 5}, TypeError),
        ({"scope": "SERVER"}, TypeError),
        ({"wait": "60"}, TypeError),
        ({"text": 5}, TypeError),
    ],
)
def test_a_rule_that_can_match_nothing_is_refused_at_once(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A row that no reply can match, or that means nothing, is an error when it is made."""
    with pytest.raises(error, match=r"\w"):
        Rule(**({"action": Action.FAIL} | arguments))


def test_rules_may_be_any_sequence() -> None:
    """A list of rules is taken, and becomes a tuple, so that the policy stays a value."""
    rules = [Rule(action=Action.FAIL)]
    policy = RetryPolicy(rules=rules)  # type: ignore[arg-type]
    rules.clear()
    assert policy.decide(LATER, Stage.MAIL).action is Action.FAIL
    assert isinstance(policy.rules, tuple)


@virtually
async def test_a_wait_that_turns_negative_later_waits_not_at_all() -> None:
    """A wait that is below zero for a later attempt only counts as none, and the send ends."""
    waited = await waits_of(patient(wait=lambda state: 20 - 10 * state.attempt_number, max_attempts=4))
    assert waited == [pytest.approx(10, abs=0.1), pytest.approx(0, abs=0.1), pytest.approx(0, abs=0.1)]


# no_wait


def test_no_wait_takes_no_time_and_records() -> None:
    """no_wait() makes any policy one that never sleeps, and lists what it would have slept."""

    async def scenario(policy: RetryPolicy, server: ScriptedServer, smtp: RetryingSMTP) -> None:
        server.on("RCPT", GREYLISTED)
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
            await smtp.sendmail(APP, [ANN], BODY)
        assert policy.waits == [60, 60, 30]  # type: ignore[attr-defined]

    async def main() -> None:
        policy = no_wait(RetryPolicy(wait=tenacity.wait_fixed(60), give_up_after=timedelta(seconds=150)))
        async with talk(policy) as (server, smtp):
            await scenario(policy, server, smtp)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 5


def test_the_default_clock_is_the_time_of_day() -> None:
    """Without a clock of one's own the delivery tells when it began in seconds since the epoch."""

    async def main() -> Delivery:
        async with talk(RetryPolicy()) as (_, smtp):
            return await smtp.deliver(BODY, sender=APP, recipients=[ANN])

    delivery = asyncio.run(main())
    assert delivery.began_at == pytest.approx(time.time(), abs=60)


FROZEN = """
import aiosmtplib, smtpretry
from smtpretry import clock
smtp = smtpretry.RetryingSMTP(aiosmtplib.SMTP(hostname="127.0.0.1"))
before = clock._time_of_day
clock._time_of_day = lambda: before() + 86_400
print(smtp.policy.clock() - clock._time_of_day())
"""


def test_a_process_that_was_frozen_after_its_imports_knows_the_time() -> None:
    """As where a function's image is made when it is deployed, and started a day later: nothing it sends is late."""
    done = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True, timeout=30, check=True)
    assert float(done.stdout) == pytest.approx(0, abs=60)


@virtually
async def test_530_costs_no_attempt_and_450_does() -> None:
    """Of two attempts allowed, a log-in uses none: 530, 450, wait, accepted."""
    mine = {"username": USER, "password": PASSWORD}
    async with talk(
        patient(max_attempts=2), auth=(USER, PASSWORD), auth_required=False, credentials=mine, pipelining=False
    ) as (
        server,
        smtp,
    ):
        server.on("MAIL", LOG_IN, times=1)
        server.on("RCPT", GREYLISTED, times=1)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert len(delivery.attempts) == 2


def pickled(policy: RetryPolicy) -> RetryPolicy:
    """Return it as another process gets it."""
    return pickle.loads(pickle.dumps(policy))  # noqa: S301 - our own


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_the_same_policy_in_another_process(way: Callable[[RetryPolicy], RetryPolicy]) -> None:
    """A policy that was copied, or that went to another process, is equal to the first."""
    for policy in (RetryPolicy(), RetryPolicy(max_attempts=3)):
        assert way(policy) == policy
