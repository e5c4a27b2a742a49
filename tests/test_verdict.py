"""What follows from the answers to one transaction, without a socket: tables of answers, and what comes of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from support import ANN, BOB, CAT

from smtpretry import NO_REPLY, Action, Decision, Reply, RetryPolicy, Rule, Scope, Stage
from smtpretry.replies.reply import Said
from smtpretry.verdict import After, Answer, Case, Judge, Verdict, fits, judge

if TYPE_CHECKING:
    from collections.abc import Collection

GROUP = [ANN, BOB, CAT]
SILENCE = "silence"
MAIL, RCPT, DATA, DOT = Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END_OF_DATA
LATER, NEVER, BYE = "450 4.2.0 Greylisted", "550 5.1.1 No such user", "421 4.3.0 Closing"
BUSY, LOG_IN, FULL = (
    "451 4.3.2 System not accepting network messages",
    "530 5.7.0 Authentication required",
    "452 4.5.3 Full",
)


def decide(
    said: Said,
    concerned: Collection[str],
    *,
    final: str | None,
    splittable: bool,
    able: Collection[Action] = frozenset(Action),
) -> Decision:
    able = set(able) - ({Action.SPLIT} if not splittable else set())
    return RetryPolicy().decide(said.reply, said.stage, able=able)


def answer(stage: Stage, said: str = "", who: str | None = None) -> Answer:
    reply = Reply(NO_REPLY, text="the line broke") if said == SILENCE else Reply.parse(said) if said else None
    success = Said(stage, Reply(250, text="queued")) if stage is DOT and not said else None
    return Answer(stage, reply and Said(stage, reply), success, who)


def answers(
    mail: str = "", rcpts: str | list[str] = "", data: str | None = None, dot: str | None = None
) -> list[Answer]:
    """Return the answers to a transaction: each "" is the success that is asked for, None is never said."""
    said = [rcpts] * len(GROUP) if isinstance(rcpts, str) else rcpts
    all_of_them = [answer(MAIL, mail), *(answer(RCPT, one, who) for one, who in zip(said, GROUP, strict=False))]
    return [*all_of_them, *(answer(stage, one) for stage, one in ((DATA, data), (DOT, dot)) if one is not None)]


def verdict_of(*args: Any, case: dict[str, Any] | None = None, **kwargs: Any) -> Verdict:
    given: dict[str, Any] = {"group": GROUP, "todo": GROUP, "pending": lambda: GROUP, "decide": decide}
    return judge(answers(*args, **kwargs), Case(**given | (case or {})))


def refused(verdict: Verdict) -> list[str]:
    return [who for ruling in verdict.refused for who in ruling.recipients]


def waiting(verdict: Verdict) -> list[str]:
    return [who for ruling in verdict.waiting for who in ruling.recipients]


@pytest.mark.parametrize(
    ("said", "taken", "gets_no_more", "waits", "after"),
    [
        ({"data": "", "dot": ""}, GROUP, [], [], After.NOTHING),
        ({"rcpts": ["", NEVER, LATER], "data": "", "dot": ""}, [ANN], [BOB], [CAT], After.NOTHING),
        ({"rcpts": NEVER}, [], GROUP, [], After.RESET),
        ({"rcpts": LATER, "data": "554 5.5.1 no valid recipients"}, [], [], GROUP, After.RESET),
        ({"mail": "451 4.3.0 later", "rcpts": []}, [], [], GROUP, After.RESET),
        ({"mail": "553 5.1.8 unknown sender", "rcpts": []}, [], GROUP, [], After.RESET),
        ({"data": "451 4.3.0 later"}, GROUP, [], GROUP, After.RESET),
        ({"data": "", "dot": "451 4.3.0 later"}, GROUP, [], GROUP, After.RESET),
        ({"data": "", "dot": "554 5.6.0 no"}, GROUP, GROUP, [], After.RESET),
        ({"data": "", "dot": BYE}, GROUP, [], GROUP, After.CLOSE),
        ({"rcpts": ["", BUSY], "data": "", "dot": ""}, [ANN], [], [BOB, CAT], After.NOTHING),
        ({"rcpts": ["", BUSY, ""], "data": "", "dot": ""}, [ANN, CAT], [], [BOB], After.NOTHING),
        ({"rcpts": ["", FULL, ""], "data": "", "dot": ""}, [ANN, CAT], [], [], After.NOTHING),
        ({"mail": BYE, "rcpts": []}, [], [], GROUP, After.CLOSE),
        ({"rcpts": ["", BYE]}, [ANN], [], [BOB], After.CLOSE),
    ],
)
def test_who_gets_what(
    said: dict[str, Any], taken: list[str], gets_no_more: list[str], waits: list[str], after: After
) -> None:
    """Each row: who is taken, who is refused for good, who waits, and what the session needs."""
    verdict = verdict_of(**said)
    assert (verdict.taken, refused(verdict), waiting(verdict), verdict.after) == (taken, gets_no_more, waits, after)


@pytest.mark.parametrize(
    ("said", "able", "repair", "after"),
    [
        ({"mail": LOG_IN, "rcpts": []}, Action, Action.AUTHENTICATE, After.RESET),
        ({"rcpts": [LOG_IN]}, Action, Action.AUTHENTICATE, After.RESET),
        ({"rcpts": [LOG_IN, ""], "data": ""}, Action, Action.AUTHENTICATE, After.CLOSE),
        (
            {"mail": "530 5.7.0 Must issue a STARTTLS command first", "rcpts": []},
            Action,
            Action.STARTTLS,
            After.NOTHING,
        ),
        ({"mail": LOG_IN, "rcpts": []}, set(Action) - {Action.AUTHENTICATE}, None, After.RESET),
    ],
)
def test_what_the_session_needs(
    said: dict[str, Any], able: Collection[Action], repair: Action | None, after: After
) -> None:
    """A repair is asked for where the session can do it; where the server waits for a message meanwhile, it is closed."""
    verdict = verdict_of(**said, case={"decide": partial(decide, able=set(able))})
    assert (verdict.repair, verdict.after) == (repair, after)
    assert refused(verdict) == ([] if repair else GROUP)


def test_silence_after_the_dot_is_in_doubt() -> None:
    """Nobody knows what became of a message whose final dot was not answered; a silence before it leaves no doubt."""
    verdict = verdict_of(data="", dot=SILENCE)
    assert verdict.in_doubt is not None
    assert (verdict.taken, waiting(verdict), verdict.after) == (GROUP, GROUP, After.CLOSE)
    assert verdict_of(data=SILENCE).in_doubt is None


def test_the_doubt_is_known_before_the_policy_is_asked() -> None:
    """What somebody else's code raises does not hide that the message may have been taken."""

    def raising(*_: object, **__: object) -> Decision:
        raise ZeroDivisionError

    one = Judge(Case(group=GROUP, todo=GROUP, pending=lambda: GROUP, decide=raising))
    for each in answers(data=""):
        one.hear(each)
    with pytest.raises(ZeroDivisionError):
        one.hear(answer(DOT, SILENCE))
    assert one.verdict.in_doubt is not None
    assert one.verdict.taken == GROUP


def test_split() -> None:
    """A transaction that is full goes with those who were taken, and the next ones are of that size."""
    verdict = verdict_of(rcpts=["", "", FULL], data="", dot="")
    assert (verdict.batch, verdict.taken, waiting(verdict)) == (2, [ANN, BOB], [])


def test_an_empty_message_for_nobody() -> None:
    """A 354 although nobody was taken is answered by a lone dot."""
    one = Judge(Case(group=GROUP, todo=GROUP, pending=lambda: GROUP, decide=decide))
    for each in answers(rcpts=NEVER, data=""):
        one.hear(each)
    assert (one.dot_is_due, one.body_is_due, one.data_is_due) == (True, False, False)
    assert one.conclude().after is After.RESET


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.EHLO, Stage.STARTTLS, Stage.AUTH])
def test_what_fails_before_mail_concerns_all(stage: Stage) -> None:
    """Where the session itself does not come about, everybody who was to be offered waits."""
    given: dict[str, Any] = {"group": [ANN], "todo": GROUP, "pending": lambda: GROUP, "decide": decide}
    assert waiting(judge([answer(stage, "454 4.7.0 not now")], Case(**given))) == GROUP


def test_one_connection_too_many() -> None:
    """Where others work, a connection that the server does not want is given up, and nobody waits for it."""
    crowd = Rule(code=421, action=Action.RECONNECT, scope=Scope.SERVER, wait=60, fewer=True)
    policy = RetryPolicy(rules=(crowd,))
    given: dict[str, Any] = {"decide": lambda said, _, **__: policy.decide(said.reply, said.stage)}
    alone = verdict_of(BYE, [], case=given)
    assert (alone.one_too_many, waiting(alone)) == (None, GROUP)
    one_of_two = verdict_of(BYE, [], case=given | {"others": lambda: True})
    assert one_of_two.one_too_many is not None
    assert waiting(one_of_two) == []


@pytest.mark.parametrize(
    ("commands", "said", "fit"),
    [
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(data=""), True),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(rcpts=["", NEVER, BYE], data=""), True),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(rcpts=NEVER, data=""), True),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(data=SILENCE), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(rcpts=["", "", SILENCE]), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(mail="451 later", rcpts="503 nested", data="503 no"), True),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(mail=BYE, rcpts=[]), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(mail="451 later", rcpts=[SILENCE]), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(mail="451 later", rcpts=["503 no", "", "503 no"]), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(mail="451 later", rcpts="503 no", data=""), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(mail=SILENCE, rcpts=[]), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(rcpts=["", "502 what?", ""], data=""), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(data="503 no"), False),
        ([MAIL, RCPT, RCPT, RCPT, DATA], answers(rcpts=NEVER, data="503 no"), True),
        ([RCPT, DATA], [answer(RCPT, "", ANN), answer(DATA, "451 later")], True),
        ([RCPT, DATA], [answer(RCPT, "", ANN)], False),
    ],
)
def test_answers_to_commands_sent_ahead(commands: list[Stage], said: list[Answer], fit: bool) -> None:
    """They are judged only where they tell which command each one answers."""
    assert fits(commands, said) is fit


def test_out_of_step() -> None:
    """Where they do not fit, nobody is blamed, nobody is taken, and it goes on over a new connection at once."""
    one = Judge(Case(group=GROUP, todo=GROUP, pending=lambda: GROUP, decide=decide))
    one.lose_step(answers(rcpts=["", SILENCE]))
    verdict = one.conclude()
    assert (verdict.taken, refused(verdict), waiting(verdict), verdict.alone) == ([], [], [], [])
    assert (verdict.after, verdict.out_of_step, one.goes_on, one.data_is_due) == (After.CLOSE, True, False, False)


def test_a_server_that_says_so_is_left_alone_also_where_the_answers_do_not_fit() -> None:
    """What concerns the server counts, whichever command it answered: nobody reconnects at once."""
    one = Judge(Case(group=GROUP, todo=GROUP, pending=lambda: GROUP, decide=decide))
    one.lose_step(answers(rcpts=["", "421 4.3.2 Server busy", SILENCE]))
    verdict = one.conclude()
    assert (waiting(verdict), verdict.alone, verdict.out_of_step, verdict.after) == (GROUP, [], False, After.CLOSE)


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.EHLO])
def test_the_successor_of_a_used_up_connection_may_fail_to_connect(stage: Stage) -> None:
    """That is no word about the others, and nobody waits for it elsewhere: not even where there are no others."""
    for others in (lambda: True, lambda: False):
        case = Case(group=GROUP, todo=GROUP, pending=lambda: GROUP, decide=decide, others=others, on_credit=True)
        verdict = judge([answer(stage, "421 4.7.0 Too many connections")], case)
        assert verdict.too_soon
        assert (verdict.one_too_many, verdict.waiting, verdict.after) == (None, [], After.CLOSE)
        final = judge([answer(stage, "554 5.7.1 Access denied")], case)
        assert final.refused
        assert not final.too_soon


def test_too_fast_is_no_dead_connection() -> None:
    """A used connection that ends with "slow down" is not replaced at once: its message waits."""
    verdict = verdict_of("421 4.7.0 too many messages, slow down", case={"reused": lambda: True})
    assert verdict.repair is None
    assert [ruling.decision.rule.slower for ruling in verdict.waiting] == [True]
