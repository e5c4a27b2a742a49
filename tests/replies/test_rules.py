"""The table decides as an experienced postmaster who read the reply would, and each row says why."""

from __future__ import annotations

import copy
import math
import pickle
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smtpretry.policy import RetryPolicy
from smtpretry.replies.kinds import KINDS
from smtpretry.replies.reply import NO_REPLY, READ, Reply
from smtpretry.replies.rule import Action, Rule
from smtpretry.replies.rules import DEFAULT_RULES
from smtpretry.replies.stage import Scope, Stage
from smtpretry.replies.tables import kinds_table, markdown_table

POLICY = RetryPolicy()
ROOT = Path(__file__).parents[2]
AUTH, MAIL, RCPT, DATA, END = Stage.AUTH, Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END_OF_DATA
EVERYTHING = frozenset(Action)


def decide(line, stage=RCPT, **facts):
    return POLICY.decide(Reply.parse(line), stage, **facts)


def action(line, stage=RCPT, **facts):
    return decide(line, stage, **facts).action.name


# --- A row ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"code": 199}, "from 200 to 599"),
        ({"code": 600}, "from 200 to 599"),
        ({"code": 0}, "from 200 to 599"),
        ({"code": range(500, 700)}, "from 200 to 599"),
        ({"code": (450, 4500)}, "from 200 to 599"),
        ({"code": ()}, "can match nothing"),
        ({"code": range(500, 400)}, "can match nothing"),
        ({"enhanced": ()}, "can match nothing"),
        ({"enhanced": "4.2"}, "an enhanced status is of class"),
        ({"enhanced": "3.2.2"}, "an enhanced status is of class"),
        ({"enhanced": "4.2.2222"}, "an enhanced status is of class"),
        ({"enhanced": "4.2.2 "}, "an enhanced status is of class"),
        ({"enhanced": "*"}, "an enhanced status is of class"),
        ({"enhanced": ("4.2.2", "four")}, "an enhanced status is of class"),
        ({"code": NO_REPLY, "enhanced": "4.2.2"}, "can match nothing"),
        ({"text": "("}, "text is no regular expression"),
        ({"text": ""}, "text is empty"),
        ({"unless": "["}, "unless is no regular expression"),
        ({"unless": ""}, "unless is empty"),
        ({"text": "a", "unless": "a"}, "can match nothing"),
        ({"stages": ()}, "can match nothing"),
        ({"stages": iter(())}, "can match nothing"),
        ({"wait": -1}, "0 or more"),
        ({"wait": math.inf}, "finite"),
        ({"wait": math.nan}, "finite"),
        ({"patience": 0}, "more than 0"),
        ({"patience": -1}, "more than 0"),
        ({"patience": math.inf}, "finite"),
        ({"name": "Greylisted"}, "lower case joined by hyphens"),
        ({"name": "grey listed"}, "lower case joined by hyphens"),
        ({"name": "grey_listed"}, "lower case joined by hyphens"),
        ({"name": "-greylisted"}, "lower case joined by hyphens"),
        ({"name": "grey--listed"}, "lower case joined by hyphens"),
        ({"name": "greylisted\n"}, "lower case joined by hyphens"),
        ({"otherwise": Action.AUTHENTICATE}, "RETRY, RECONNECT or FAIL"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_at_once(fields, cause):
    """What can match nothing, or can be no reply's, is a ValueError that says so where it is written."""
    with pytest.raises(ValueError, match=re.escape(cause)):
        Rule(**({"action": Action.RETRY} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "RETRY"},
        {"action": None},
        {"code": "450"},
        {"code": 450.0},
        {"code": True},
        {"code": [450]},
        {"code": ("450",)},
        {"enhanced": 4},
        {"enhanced": ["4.2.2"]},
        {"enhanced": (4,)},
        {"text": b"greylisted"},
        {"text": re.compile("greylisted")},
        {"stages": Stage.RCPT},
        {"stages": "RCPT"},
        {"stages": ["RCPT"]},
        {"wait": "60"},
        {"wait": True},
        {"scope": "SERVER"},
        {"otherwise": "FAIL"},
        {"patience": "60"},
        {"patience": True},
        {"slower": 1},
        {"name": None},
        {"name": 5},
        {"cure": None},
        {"token": 1},
        {"why": None},
        {"source": 5321},
    ],
)
def test_a_value_of_another_type_is_refused_at_once(fields):
    """A TypeError names the field."""
    (name,) = fields
    with pytest.raises(TypeError, match=rf"^{name} is"):
        Rule(**({"action": Action.RETRY} | fields))


def test_what_a_rule_leaves_out_matches_everything():
    """A rule with an action alone is about every reply at every stage."""
    rule = Rule(action=Action.RETRY)
    assert all(rule.matches(Reply(code), stage) for code in (NO_REPLY, 250, 421, 550) for stage in Stage)


@pytest.mark.parametrize(
    ("fields", "matching", "others"),
    [
        ({"code": 450}, ["450 a"], ["451 a", "550 a"]),
        ({"code": (450, 451)}, ["450 a", "451 a"], ["452 a"]),
        ({"code": range(400, 500)}, ["400 a", "499 a"], ["399 a", "500 a"]),
        ({"enhanced": "4.2.2"}, ["450 4.2.2 a"], ["450 4.2.22 a", "550 5.2.2 a", "450 a", "450 4.2.1 a"]),
        ({"enhanced": "x.7.26"}, ["421 4.7.26 a", "550 5.7.26 a"], ["550 5.7.2 a", "550 5.7.261 a"]),
        ({"enhanced": "4.7.*"}, ["450 4.7.1 a", "450 4.7.650 a"], ["450 4.2.1 a", "550 5.7.1 a"]),
        ({"enhanced": ("4.2.2", "4.3.1")}, ["450 4.2.2 a", "452 4.3.1 a"], ["450 4.3.2 a"]),
        ({"enhanced": "5.1.1"}, ["550 no such user (#5.1.1)"], ["550 no such user (#5.1.2)"]),
        ({"text": "grey.?listed"}, ["450 GREY-Listed", "450-You are grey\n450 listed"], ["450 blacklisted"]),
        ({"text": "many", "unless": "hour"}, ["452 too many"], ["452 too many this Hour", "452 enough"]),
    ],
)
def test_a_rule_matches_what_it_names(fields, matching, others):
    """Code, status and text each narrow the rule down; case and line breaks do not matter."""
    rule = Rule(action=Action.RETRY, **fields)
    assert [line for line in matching if not rule.matches(Reply.parse(line), RCPT)] == []
    assert [line for line in others if rule.matches(Reply.parse(line), RCPT)] == []


def test_a_rule_matches_at_its_stages_only():
    """Any iterable names the stages, an iterator too, and it can be asked again and again."""
    rule = Rule(action=Action.RETRY, stages=iter([Stage.MAIL, Stage.RCPT]))
    for _ in range(2):
        assert [stage for stage in Stage if rule.matches(Reply(450), stage)] == [Stage.MAIL, Stage.RCPT]


def test_a_rule_for_tokens_matches_token_sessions_only():
    """`token=True` is about sessions that log in with a token."""
    rule = Rule(action=Action.REFRESH_TOKEN, token=True)
    assert rule.matches(Reply(535), AUTH, token=True)
    assert not rule.matches(Reply(535), AUTH)


def test_a_rule_looks_at_the_beginning_of_a_text():
    """What a server says after a thousand characters changes nothing, and costs nothing."""
    rule = Rule(action=Action.RETRY, text="needle")
    assert rule.matches(Reply(450, text=" " * (READ - 6) + "needle"), RCPT)
    assert not rule.matches(Reply(450, text=" " * READ + "needle"), RCPT)


def test_rules_are_values():
    """Equal rules are equal and of one hash; they can be copied, pickled and put in a set."""
    one = Rule(code=450, text="busy", stages=[Stage.MAIL, Stage.RCPT], action=Action.RETRY)
    two = Rule(code=450, text="busy", stages=(Stage.RCPT, Stage.MAIL), action=Action.RETRY)
    assert one == two == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one)  # noqa: S301 - our own
    assert len({one, two}) == 1
    assert one != Rule(code=450, text="busy", action=Action.RETRY)


def test_a_rule_that_has_been_asked_is_the_same_value():
    """What it remembers of having matched is no part of it: it is equal, pickled and copied as before."""
    asked = Rule(text="busy", unless="idle", enhanced="4.x.x", action=Action.RETRY)
    asked.matches(Reply(450, "4.2.0", "busy"), RCPT)
    assert asked == pickle.loads(pickle.dumps(asked)) == copy.deepcopy(asked)  # noqa: S301 - our own
    assert pickle.dumps(asked) == pickle.dumps(Rule(text="busy", unless="idle", enhanced="4.x.x", action=Action.RETRY))


@pytest.mark.parametrize(
    "rule",
    [
        *DEFAULT_RULES,
        Rule(action=Action.FAIL),
        Rule(action=Action.RETRY, wait=0),
        Rule(name="mine", action=Action.RETRY, wait=1, slower=True, patience=60, cure="Send less."),
    ],
)
def test_a_repr_is_how_a_rule_is_written(rule):
    """It names what is given and nothing else, and evaluates to the same rule."""
    names = {"Rule": Rule, "Action": Action, "Scope": Scope, "Stage": Stage, "range": range}
    assert eval(repr(rule), {"__builtins__": {}}, names) == rule  # noqa: S307 - our own
    assert "None" not in repr(rule)


# --- The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DEFAULT_RULES, ids=range(1, len(DEFAULT_RULES) + 1))
def test_each_row_says_why_and_who_says_so(rule):
    """A support engineer can paste the reason into a ticket: one sentence, and its source."""
    assert re.fullmatch(r"[A-Z].{20,130}\.", rule.why)
    assert re.fullmatch(r"|[A-Z].{10,130}\.", rule.cure)
    assert rule.source
    assert "http" not in rule.source


def test_each_row_has_a_name_of_its_own():
    """Names are short, in lower case with hyphens, and no two rows share one, nor what holds where no row matches."""
    unmatched = [RetryPolicy(rules=()).decide(Reply(code), RCPT).rule for code in (NO_REPLY, 450, 550)]
    names = [rule.name for rule in (*DEFAULT_RULES, *unmatched)]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z]+(-[a-z]+){0,3}", name)] == []


def test_each_row_is_of_one_kind():
    """The short table speaks of every row, and of each once."""
    assert sorted(name for kind in KINDS for name in kind.rows) == sorted(rule.name for rule in DEFAULT_RULES)


def test_a_row_says_slower_where_it_is_too_fast():
    """Such a row waits, concerns the whole server, and says how long."""
    rows = [rule for rule in DEFAULT_RULES if rule.slower]
    assert rows
    assert {(rule.scope, rule.wait is not None) for rule in rows} == {(Scope.SERVER, True)}


@pytest.mark.parametrize("rule", DEFAULT_RULES, ids=lambda rule: rule.name)
def test_no_4xx_is_final(rule):
    """A client goes by the first digit (RFC 5321 §4.2.1); what rarely passes has a patience instead."""
    codes = {rule.code} if isinstance(rule.code, int) else set(rule.code or ())
    if any(400 <= code < 500 for code in codes):
        assert Action.FAIL not in (rule.action, rule.otherwise)


def test_a_row_with_a_wait_waits():
    """A wait stands on rows that say "later", and nowhere else."""
    assert {rule.action for rule in DEFAULT_RULES if rule.wait is not None} == {Action.RETRY, Action.RECONNECT}
    assert {rule.action for rule in DEFAULT_RULES if rule.wait == 0} == {Action.RECONNECT}


def test_no_row_stands_behind_one_that_takes_all_of_it():
    """A row whose every reply an earlier row takes would never be read."""
    for number, rule in enumerate(DEFAULT_RULES):
        for earlier in DEFAULT_RULES[:number]:
            if earlier.text or earlier.unless or earlier.token or earlier.enhanced or earlier.stages:
                continue
            codes = {rule.code} if isinstance(rule.code, int) else set(rule.code or range(200, 600))
            taken = {earlier.code} if isinstance(earlier.code, int) else set(earlier.code or range(200, 600))
            assert not codes <= taken, f"row {number + 1} stands behind {earlier}"


@pytest.mark.parametrize(
    ("page", "name", "made"), [("smtpretry/RULES.md", "rules", markdown_table), ("README.md", "kinds", kinds_table)]
)
def test_the_tables_in_the_pages_are_the_rows(page, name, made):
    """Both are made from the rows: `python -m smtpretry rules --into README.md` makes them anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (table,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert table == made()


def test_the_table_by_kinds_tells_what_the_rows_do():
    """Waits and limits in it are the rows' own, and it is some dozen lines of five cells."""
    lines = kinds_table().splitlines()[2:]
    assert len(lines) == len(KINDS) <= 24
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines}
    assert {len(row) for row in cells.values()} == {5}
    assert cells["Greylisting"][2:4] == ["the backoff", "1 day"]
    assert cells["Rate limit"][2:4] == ["1 s, 3 s, 1 min", "`give_up_after`"]
    assert cells["Connection used up"][2] == "none"
    assert cells["Message too big"][2:4] == ["", ""]


def test_the_markdown_table_has_a_row_for_each_rule():
    """Each row stands there in its order with its reason and source, and no cell breaks the table."""
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(DEFAULT_RULES)
    for line, rule in zip(lines[2:], DEFAULT_RULES, strict=True):
        assert line.startswith(f"| {rule.name} | ")
        assert line.endswith(f" {rule.why} | {rule.source} |")
        assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"\|", lines[0]))
    custom = Rule(action=Action.RETRY, code=(NO_REPLY, 450), enhanced="4.2.*", token=True, why="a|b", source="c")
    assert markdown_table([custom]).splitlines()[2] == (
        r"|  | no reply, 450 4.2.* (token sessions) | any stage | RETRY | by stage | the backoff |  | a\|b | c |"
    )


@pytest.mark.parametrize("rule", DEFAULT_RULES, ids=range(1, len(DEFAULT_RULES) + 1))
def test_a_hostile_text_costs_next_to_nothing(rule):
    """32 KB of any of a row's own words, or of what its gaps let pass, are searched in no time: far below 50 ms."""
    words = {
        *re.findall(r"[a-z]{2,}", f"{rule.text} {rule.unless}"),
        "too many 12",
        "a" * 40,
        "a.",
        "-",
        "<bob@example.com>",
    }
    stage = next(stage for stage in Stage if rule.stages is None or stage in rule.stages)
    for word in words:
        text = f"{word} " * (32000 // (len(word) + 1))
        reply = Reply(rule.code if isinstance(rule.code, int) else 450, None, text)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            rule.matches(reply, stage, token=True, login=True)
            times.append(time.perf_counter() - began)
        assert min(times) < 0.05, word


@given(code=st.integers(400, 599), status=st.none() | st.tuples(*[st.integers(0, 99)] * 2), text=st.text(max_size=300))
@settings(deadline=None)
def test_every_refusal_has_a_decision(code, status, text):
    """Whatever is said, at whatever stage, something is done about it, and 421 always leaves the connection."""
    enhanced = f"{code // 100}.{status[0]}.{status[1]}" if status else None
    for stage in Stage:
        decision = POLICY.decide(Reply(code, enhanced, text), stage)
        assert decision.wait >= 0
        assert decision.rule.why
        if code == 421:
            assert decision.action in {Action.RECONNECT, Action.STARTTLS}


# --- Silence and hang-ups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", Stage)
def test_silence_means_a_new_connection(stage):
    """A lost connection, a time-out and a malformed reply are about the connection, at any stage."""
    reply = Reply(NO_REPLY, text="Unexpected EOF received")
    assert POLICY.decide(reply, stage).action is Action.RECONNECT


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.STARTTLS])
def test_a_certificate_that_does_not_verify_is_final(stage):
    """Reconnecting shows the same certificate."""
    reply = Reply(NO_REPLY, text="[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")
    decision = POLICY.decide(reply, stage)
    assert (decision.action, decision.scope) == (Action.FAIL, Scope.SERVER)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize(
    "line", ["421", "421 4.3.0 closing connection", "421 5.7.1 blocked", "421 4.1.1 user unknown", "421 spam"]
)
def test_421_leaves_the_connection(line, stage):
    """Whatever else a 421 says, and whenever."""
    assert action(line, stage) == "RECONNECT"


@pytest.mark.parametrize(
    "line",
    [
        "421 4.7.0 Error: too many connections from 192.0.2.1",
        "421 4.3.2 Service not available, closing transmission channel",
        "421 mail.example.com shutting down",
        "421 4.7.0 [TSS04] Messages from 192.0.2.1 temporarily deferred due to unexpected volume or user complaints",
        "421 4.7.28 Gmail has detected an unusual rate of mail",
        "421 Timeout waiting for data from client.",
        "421 4.3.2 This session has been open for too long",
        "421 4.4.2 Connection dropped",
        "421 <bob@example.com> Service not available",
        "421 4.7.0 mail.example.com closing connection",
        "421 4.7.0 Try again later, closing connection. (RCPT) k7-20020a05 - gsmtp",
    ],
)
def test_a_server_in_trouble_is_left_alone_by_all(line):
    """A 421 about the whole server concerns every send to it, even in the middle of a transaction."""
    assert decide(line, RCPT).scope is Scope.SERVER


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("421 4.4.2 mx.example.com Error: timeout exceeded", MAIL),
        ("421 idle for too long", MAIL),
        ("421 too many messages in this connection", MAIL),
        ("452 4.5.3 Too many messages sent", MAIL),
        ("452 4.4.5 Maximum number of messages per session exceeded.", MAIL),
        (
            "550 This message has exceeded the max number of messages per session. Open a new session and try again.",
            END,
        ),
        ("452 Too many messages", MAIL),
        ("450 Message limit reached for this connection", MAIL),
        ("451 4.7.0 Messages per session limit reached", MAIL),
        ("450 Too many messages on this connection", RCPT),
        ("451 4.7.0 Timeout waiting for client input", DATA),
        ("451 4.4.2 Timed out waiting for data from the client", RCPT),
        ("502 Timeout from client", MAIL),
        ("554 Too many nonmail commands", MAIL),
        ("503 5.5.2 Send hello first [AM0PR01CA0001.eurprd01.prod.exchangelabs.com]", MAIL),
        ("503 EHLO/HELO first please", MAIL),
        ("503 5.5.1 Error: nested MAIL command", MAIL),
        ("503 Sender already specified", MAIL),
    ],
)
def test_a_used_up_connection_is_replaced_at_once(line, stage):
    """Idle for too long, a session that is full or has lost its place: a new connection cures it, without waiting."""
    decision = decide(line, stage)
    assert (decision.action, decision.wait) == (Action.RECONNECT, 0)


@pytest.mark.parametrize("code", ["421", "451"])
def test_a_server_that_tired_of_waiting_concerns_no_message(code):
    """It gave up the connection, whichever command came too late."""
    assert {
        decide(f"{code} 4.4.2 Timed out waiting for client input", stage).scope for stage in (MAIL, RCPT, DATA)
    } == {Scope.SERVER}


def test_a_name_that_the_server_hangs_up_on_names_the_cure():
    """Some take no EHLO that says localhost, and call it busy."""
    decision = decide("421 4.7.0 Try again later, closing connection. (EHLO) v6-20020a - gsmtp", Stage.EHLO)
    assert (decision.action, decision.scope) == (Action.RECONNECT, Scope.SERVER)
    assert "local_hostname=" in decision.rule.cure


def test_a_server_that_speaks_lmtp_is_said_to():
    """It objects to EHLO, which is no objection to the client's name."""
    decision = decide("500 Error: EHLO not allowed in LMTP server", Stage.EHLO)
    assert (decision.action, decision.scope, decision.rule.name) == (Action.FAIL, Scope.SERVER, "not-smtp")
    assert "port=" in decision.rule.cure


@pytest.mark.parametrize(
    ("line", "stage", "row"),
    [
        ("421 mx.example.com Too many connected clients, try again in a moment", Stage.CONNECT, "closing-crowded"),
        ("421 4.3.2 Too many open connections.", Stage.CONNECT, "closing-crowded"),
        ("421 4.7.0 mx.example.com Too many bad recipients; closing connection", RCPT, "closing"),
        ("421 4.7.0 mx.example.com Too many bad commands; closing connection", MAIL, "closing-out-of-service"),
    ],
)
def test_too_many_connections_are_not_too_many_of_something_else(line, stage, row):
    """Which is why the connection closes: Sendmail says so in one line."""
    assert decide(line, stage).rule.name == row


def test_403_about_tls_is_not_about_the_sender():
    """Sendmail says 403 where TLS failed or is too weak, SendGrid where the account may not send as that sender."""
    assert decide("403 4.7.0 TLS handshake failed.", MAIL).rule.name == "transient"
    assert decide("403 4.7.0 encryption too weak 0 less than 56", MAIL).rule.name == "transient"


@pytest.mark.parametrize("line", ["501 5.0.0 Invalid domain name", "501 Syntactically invalid EHLO argument(s)"])
def test_a_greeting_that_is_refused_names_the_cure(line):
    """A host may have a name that is none for SMTP, as in a container."""
    decision = decide(line, Stage.EHLO)
    assert (decision.action, decision.scope) == (Action.FAIL, Scope.SERVER)
    assert "local_hostname=" in decision.rule.cure


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("421 Domain x.mailgun.org is not allowed to send: Free accounts are for test purposes only.", END),
        ("421 4.7.0 Your account is temporarily blocked", MAIL),
        ("451 Authentication failed: Maximum credits exceeded", AUTH),
    ],
)
def test_an_account_that_may_not_send_now_names_the_cure(line, stage):
    """Its mail waits, all of it, and somebody has to ask the provider."""
    decision = decide(line, stage)
    assert decision.action in {Action.RETRY, Action.RECONNECT}
    assert (decision.scope, "provider" in decision.rule.cure) == (Scope.SERVER, True)


def test_a_client_that_is_held_back_concerns_the_server():
    """Exchange Online says it to a recipient, and means whoever sends."""
    line = "451 4.7.500 Access denied, please try again later. For more information please go to https://x (AS112201)"
    assert decide(line, RCPT).scope is Scope.SERVER


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("503 5.5.0 <DATA>: Data command rejected: Improper use of SMTP command pipelining", DATA),
        ("550 5.5.1 Protocol error", MAIL),
        ("451 qq trouble in home directory", END),
        ("451 unable to read controls (#4.3.0)", RCPT),
        ("550 No DNS entry for your host", RCPT),
        ("554 5.7.1 You have sent mail to a spamtrap", RCPT),
        ("550 Outgoing blocked", RCPT),
        ("550 reconnecting too fast", RCPT),
    ],
)
def test_what_concerns_all_that_is_sent(line, stage):
    """The host, the account, or how the client speaks: not this message or recipient."""
    assert decide(line, stage).scope is Scope.SERVER


@pytest.mark.parametrize(
    ("line", "stage", "scope"),
    [
        ("554 <user@example.com>... Remote protocol error", RCPT, Scope.RECIPIENT),
        ("501-<bob@>: malformed address\n501 Too many syntax or protocol errors", RCPT, Scope.RECIPIENT),
        ("550 5.6.11 SMTP protocol violation: bare linefeeds in the body", END, Scope.MESSAGE),
        ("550 5.7.1 <bob@example.com>: Recipient address rejected: Mailbox not verified", RCPT, Scope.RECIPIENT),
        ("550 5.1.1 <bob@example.com>: address not verified", END, Scope.RECIPIENT),
        ("552 Mailbox contains more than 104857600 bytes", RCPT, Scope.RECIPIENT),
        ("550 5.1.2 Recipient domain has no correct DNS entry", RCPT, Scope.RECIPIENT),
        ("450 4.1.8 Sender domain example.org has no correct DNS", MAIL, Scope.MESSAGE),
        ("550 5.1.8 There are no DNS records for your domain", RCPT, Scope.MESSAGE),
        ("450 4.7.1 <bob@example.com>: mail sent to spam trap", RCPT, Scope.RECIPIENT),
        ("451 Could not open file /var/mail/bob", RCPT, Scope.RECIPIENT),
        ("550 5.7.1 Outbound blocked: the message contains a virus", END, Scope.MESSAGE),
        ("550 5.4.4 <bob@example.com>: the next host timed out, closing", RCPT, Scope.RECIPIENT),
    ],
)
def test_what_concerns_one_message_or_recipient_holds_up_no_other(line, stage, scope):
    """Words that elsewhere are about the client, or about the message."""
    assert decide(line, stage).scope is scope


def test_postscreen_lets_in_on_the_next_connection():
    """Postfix's postscreen says 450 4.3.2 to a client that it has tested, until that hangs up."""
    assert action("450 4.3.2 Service currently unavailable") == "RECONNECT"


# --- Log in, encrypt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("530", MAIL),
        ("550 5.7.1 Relaying denied. Proper authentication required.", RCPT),
        ("550 Relay prohibited", RCPT),
        ("553 host denies relay.", RCPT),
        ("553 sorry, that domain isn't in my list of allowed rcpthosts (#5.5.3 - chkuser)", RCPT),
        ("550 5.7.1 Login required to send mail", MAIL),
        ("550 5.7.1 Unauthenticated clients may not send mail", RCPT),
        ("553 Log in with your user name and password before you send", RCPT),
        ("550 5.7.1 Only logged-in users may relay", RCPT),
        ("550 Authentifizierung erforderlich", RCPT),
        ("550 Se requiere autenticación", RCPT),
        ("553 authentication is required,smtp1,AAAA", MAIL),
        ("530 5.7.0 Authentication required", MAIL),
        ("530 5.5.1 Must issue an AUTH command first", MAIL),
        ("530 Error: authentication Required", MAIL),
        ("530 5.7.57 Client not authenticated to send mail", MAIL),
        ("503 5.5.4 Error: send AUTH command first", MAIL),
        ("503 5.5.1 You must authenticate first.", MAIL),
        ("550 SMTP authentication is required.", RCPT),
        ("550 relay not permitted", RCPT),
        ("550 I cannot deliver mail for <bob@example.com>", RCPT),
        ("553 5.7.1 <app@example.com>: Sender address rejected: not logged in", RCPT),
        ("554 5.7.1 <mx[192.0.2.1]>: Client host rejected: Access denied", RCPT),
        ("554 5.7.1 <bob@example.com>: Relay access denied", RCPT),
        ("454 4.7.1 <bob@example.com>: Relay access denied", RCPT),
    ],
)
def test_who_is_not_logged_in_logs_in(line, stage):
    """However a server puts it; and where there is nothing to log in with, the first digit says what follows."""
    assert action(line, stage) == "AUTHENTICATE"
    alone = decide(line, stage, able=EVERYTHING - {Action.AUTHENTICATE})
    assert alone.action is (Action.RETRY if line[0] == "4" else Action.FAIL)
    assert line[0] == "5" or alone.rule.patience == 600


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("503 5.5.1 Error: already authenticated", AUTH),
        ("503 5.7.0 Already authenticated, no identity changes permitted", MAIL),
        ("502 5.7.0 Authentication not supported", AUTH),
        ("503 5.5.1 Error: authentication not enabled", AUTH),
        ("550 5.7.26 Unauthenticated email from example.com is not accepted due to domain's DMARC policy", END),
        ("550 5.7.26 This mail has been blocked because the sender is unauthenticated (SPF, DKIM)", END),
        ("550 5.7.9 The sender is unauthenticated. Yahoo requires all senders to authenticate with SPF or DKIM.", END),
        ("550 5.7.1 This message does not have authentication information", END),
        ("550 5.7.1 RESOLVER.RST.AuthRequired; authentication required", RCPT),
    ],
)
def test_words_about_authentication_need_not_ask_for_a_log_in(line, stage):
    """Sender authentication (SPF, DKIM, DMARC) and a second AUTH are no case for a password."""
    assert action(line, stage) == "FAIL"


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("530 5.7.0 Must issue a STARTTLS command first", MAIL),
        ("530 Must issue a STARTTLS command first", AUTH),
        ("451 5.7.3 STARTTLS is required to send mail", MAIL),
        ("523 5.7.10 TLS is required", MAIL),
        ("538 5.7.11 Encryption required for requested authentication mechanism", AUTH),
        ("538 Error: Must issue a STARTTLS command first", AUTH),
        ("550 5.7.10 Encryption needed", RCPT),
        ("421 4.7.0 TLS required for RCPT domain, closing connection.", RCPT),
    ],
)
def test_a_server_that_wants_tls_gets_tls(line, stage):
    """Before MAIL, before AUTH, for one recipient's domain; by code, by status or by words."""
    assert action(line, stage) == "STARTTLS"


@pytest.mark.parametrize(
    ("line", "stage", "expected"),
    [
        ("454 4.7.0 TLS not available due to local problem", Stage.STARTTLS, "RETRY"),
        ("454 4.3.0 Try again later", AUTH, "RETRY"),
        ("454 4.7.0 Temporary authentication failure", AUTH, "RETRY"),
        ("454 Throttling failure: Maximum sending rate exceeded", END, "RETRY"),
        ("454 4.7.1 <bob@example.com>: Relay access denied", RCPT, "AUTHENTICATE"),
        ("454 5.5.1 STARTTLS not available", Stage.STARTTLS, "RETRY"),
    ],
)
def test_454_means_different_things(line, stage, expected):
    """TLS that is down, a password that cannot be checked, a throttle, a relay refused: by words and stage."""
    assert action(line, stage) == expected


@pytest.mark.parametrize(
    "line",
    [
        "454 4.7.0 Temporary authentication failure",
        "432 4.7.12 A password transition is needed",
        "435 Unable to authenticate at present",
        "450 4.7.1 Error: too many AUTH commands from 192.0.2.1",
        "535 5.7.8 Error: authentication failed: Temporary authentication failure",
        "535 5.7.8 Error: authentication failed: Connection lost to authentication server",
        "535 Error: authentication failed, system busy",
    ],
)
def test_a_password_that_cannot_be_checked_is_not_a_wrong_one(line):
    """The server is left alone for a while, and asked again."""
    decision = decide(line, AUTH)
    assert (decision.action, decision.scope) == (Action.RETRY, Scope.SERVER)


@pytest.mark.parametrize(
    "line",
    [
        "535 5.7.8 Error: authentication failed",
        "535 Incorrect authentication data",
        "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant.",
        "534 5.7.9 Please log in with your web browser and then try again...",
        "534 5.7.14 <https://accounts.example.com/signin> Please log in via your web browser and then try again.",
        "530 Invalid username or password",
        "504 5.7.4 Unrecognized authentication type",
        "535 Login fail. Account is abnormal, service is not open, password is incorrect, login frequency limited, or",
        "535 Wrong user name or password, or a temporary failure",
        "535 Invalid password, or the server is busy",
        "535 5.7.8 Account has been shut down",
    ],
)
def test_a_wrong_password_is_final(line):
    """It is not tried again, whatever there is to do in a web browser, and where it is one guess of several."""
    assert action(line, AUTH) == "FAIL"


@pytest.mark.parametrize("line", ["526 Authentication failure[0]", "550 User has no permission", "554 xyzzy"])
def test_a_log_in_that_is_refused_otherwise_names_the_cure(line):
    """Whatever code a server has for it."""
    decision = decide(line, AUTH)
    assert (decision.action, decision.scope) == (Action.FAIL, Scope.SERVER)
    assert "user name and the password" in decision.rule.cure


def test_a_refused_token_is_asked_for_again():
    """535 in a session with a token, or in any where the server says that a token is the trouble."""
    assert action("535 5.7.8 Username and Password not accepted", AUTH, token=True) == "REFRESH_TOKEN"
    assert action("535 5.7.8 OAuth token expired.", AUTH) == "REFRESH_TOKEN"
    assert action("535 5.7.3 Bearer token is invalid", AUTH) == "REFRESH_TOKEN"
    assert action("535 5.7.8 x", AUTH, token=True, able=EVERYTHING - {Action.REFRESH_TOKEN}) == "FAIL"


# --- Recipients and rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "452 4.5.3 Error: too many recipients",
        "451 4.5.3 Too many recipients",
        "450 Too many recipients",
        "552 too many recipients",
        "552 5.5.3 Maximum limit of 50 recipients reached",
        "550 5.5.3 anything",
        "552 Max recipients per message is 50",
        "550 Requested mail action not taken: too much recipient",
        "431 Too many recipients.",
        "451 only one recipient per message, please",
        "452 Trop de destinataires",
        "452",
        "552",
        "452 4.5.3 Domain policy size per transaction exceeded, please try this recipient in a separate transaction.",
        "451 4.3.0 Multiple destination domains per transaction is unsupported. Please try again.",
    ],
)
def test_a_full_transaction_is_split(line):
    """The recipients taken go now and the rest at once; where nobody was taken, only 4xx comes again."""
    assert action(line) == "SPLIT"
    alone = action(line, able=EVERYTHING - {Action.SPLIT})
    assert alone == ("RETRY" if line[0] == "4" else "FAIL")


@pytest.mark.parametrize(
    "line",
    [
        "452 Too many recipients received this hour",
        "450 4.7.1 Error: too many recipients from 192.0.2.1",
        "452 4.5.3 Too many recipients today",
        "450 4.7.1 Error: too much mail from 192.0.2.1",
        "454 Throttling failure: Daily message quota exceeded",
        "550 5.4.5 Daily user sending quota exceeded.",
        "550 5.7.0 Requested action not taken: too many emails per second",
        "550 You reached a daily sending limit for your account",
        "450 4.7.1 <bob@example.com>: Recipient address rejected: daily send cap reached",
        "554 Your message could not be sent. The limit on the number of allowed outgoing messages was exceeded.",
        "454 Atencao: voce atingiu o limite maximo de envio: 1000 mensagens em 60 minuto(s).",
    ],
)
def test_a_rate_is_waited_for_by_the_whole_client(line):
    """Too much in a time is no case for a split: nothing goes to that server for a while."""
    decision = decide(line)
    assert (decision.action, decision.scope) == (Action.RETRY, Scope.SERVER)


@pytest.mark.parametrize("stage", [MAIL, RCPT, END])
@pytest.mark.parametrize(
    ("line", "wait"),
    [
        ("454 Throttling failure: Maximum sending rate exceeded", 1),
        ("550 5.7.0 Requested action not taken: too many emails per second", 1),
        ("450 4.7.1 Limit of 10 messages/sec exceeded", 1),
        ("421 4.7.0 Too many messages per second", 1),
        ("450 4.7.0 Message rate limit exceeded (20 msgs / 60 s)", 60),
        ("452 Only 100 mails per minute, limit exceeded", 60),
        ("421 4.7.0 You have exceeded your rate limit of 100 messages per minute", 60),
        ("450 4.7.1 <END-OF-MESSAGE>: End-of-data rejected: Number messages per hour exceeded. Error:RATE_MSG", 600),
        ("454 Throttling failure: Daily message quota exceeded", 600),
        ("421 4.7.0 Daily limit of messages exceeded", 600),
        ("450 4.7.1 too many messages, please slow down", 3),
        ("450 4.7.1 Error: too much mail from 192.0.2.1", 3),
        ("451 4.7.1 You are sending too fast", 3),
        ("450 Zu viele Nachrichten, bitte langsamer", 3),
        ("550 Domain frequency limited", 3),
        ("450 4.7.1 Your sending speed is too high", 3),
        ("451 4.7.1 Please reduce your sending frequency", 3),
        ("452 4.7.1 Traffic limit for your IP address exceeded", 3),
        ("450 Sendelimit erreicht", 3),
        ("450 Te veel berichten", 3),
        ("452 4.7.1 No more than 250 recipients an hour, come back later", 600),
        ("452 4.7.1 Burst limit exceeded", 3),
        ("450 4.7.1 Excessive message rate", 3),
        ("450 4.7.1 100 recipients in 10 minutes exceeded", 60),
        ("450 4.7.1 Sender has exceeded 100 messages in 60 minutes", 60),
        ("421 4.7.0 too many messages, slow down", 3),
    ],
)
def test_a_client_that_is_too_fast_slows_down(line, wait, stage):
    """It concerns the server, at any stage; the wait goes by the time that the limit names, else it is a few seconds."""
    decision = decide(line, stage)
    assert (decision.rule.slower, decision.scope, decision.wait) == (True, Scope.SERVER, wait)
    assert decision.action is (Action.RECONNECT if line.startswith("421") else Action.RETRY)
    assert decide(line, stage, attempt=2).wait == min(2 * wait, 900)


@pytest.mark.parametrize(
    "line",
    [
        "421 4.7.0 [TSS04] Messages from 192.0.2.1 temporarily deferred due to unexpected volume or user complaints",
        "451 4.7.650 The mail server [192.0.2.1] has been temporarily rate limited due to IP reputation.",
        "421 4.7.0 Error: too many connections from 192.0.2.1",
        "432 4.3.2 Concurrent connections limit exceeded.",
        "450 4.2.1 The user you are trying to contact is receiving mail too quickly.",
        "421 too many messages in this connection",
        "452 4.5.3 Error: too many recipients",
    ],
)
def test_what_a_slower_pace_does_not_cure_is_no_rate(line):
    """Reputation, connections, one recipient's rate, a session and a transaction that are full do not lower the pace."""
    assert not decide(line).rule.slower


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("450 4.2.1 The user you are trying to contact is receiving mail too quickly.", "RETRY"),
        ("550 Recipient frequency limited", "RETRY"),
        ("421 4.2.1 The user you are trying to contact is receiving mail too quickly.", "RECONNECT"),
        ("450 4.2.1 The recipient has exceeded message rate limit. Try again later.", "RETRY"),
        ("451 Mailbox is receiving too many messages per minute", "RETRY"),
        ("452 4.2.2 Mailbox full", "RETRY"),
        ("421 4.2.2 Mailbox over quota", "RECONNECT"),
        ("450 Postfach voll", "RETRY"),
        ("450 4.3.2 <bob@example.com>: this domain is not accepting mail yet; try again later", "RETRY"),
        ("450 4.1.1 <bob@example.com>: Recipient address rejected: User unknown", "RETRY"),
        ("421 4.7.1 RCP-T4 Recipient account is unavailable", "RECONNECT"),
        (
            "550 <bob@web.de> Benutzer hat zuviele Mails auf dem Server. / User has too many messages on the server.",
            "FAIL",
        ),
        ("552 Account(s) <bob@example.com> does not have enough space", "FAIL"),
        ("552 5.2.2 Quota exceeded (mailbox for user is full)", "FAIL"),
        ("552 Mailbox size limit exceeded", "FAIL"),
        ("550 5.1.1 No such user", "FAIL"),
        ("550 Inactive mailbox", "FAIL"),
        ("554 delivery error: This account has been disabled or discontinued [#102].", "FAIL"),
        ("450 4.4.2 Mailbox busy", "RETRY"),
        ("406 You tried to send to recipient(s) that have been marked as inactive.", "RETRY"),
        ("452 4.2.1 Recipient is over their hourly incoming limit", "RETRY"),
        ("450 4.2.1 Mailbox locked", "RETRY"),
        ("450 4.7.1 <bob@example.com>: too many messages to this address", "RETRY"),
        ("451 4.3.0 <bob@example.com> Internal error", "RETRY"),
        ("550 Mail is rejected by recipients", "FAIL"),
        ("550 5.7.1 RDENY 192.0.2.5: The receiver denied your mail. Please use another way.", "FAIL"),
        ("550 5.7.133 Sender not authenticated for group", "FAIL"),
        ("550 5.7.124 Sender not in allowed-senders list", "FAIL"),
        ("550 5.7.129 RESOLVER.RST.RestrictedToRecipientsPermission; not authorized to send to recipient", "FAIL"),
        ("552 Would exceed maximum mailbox size", "FAIL"),
        ("550 permanent failure for one or more recipients (bob@example.com)", "FAIL"),
        ("550 Email does not exist", "FAIL"),
    ],
)
def test_what_is_about_one_recipient_leaves_the_others_alone(line, expected):
    """A full or unknown mailbox and a recipient's own limit concern that recipient, after the data too."""
    for stage in (
        (RCPT, END)
        if not line.startswith("421 4.7.1 RCP") and "this domain" not in line and "Internal" not in line
        else (RCPT,)
    ):
        decision = decide(line, stage)
        assert (decision.action.name, decision.scope, decision.rule.slower) == (expected, Scope.RECIPIENT, False)


def test_a_sender_that_gets_too_many_bounces_is_no_rate():
    """What bounces is not what the recipient gets: no wait cures it."""
    assert action("550 5.7.1 Recipient address rejected: Domain example.com receiving too many bounces.") == "FAIL"
    assert action("550 5.2.1 The user is receiving too many messages.") == "RETRY"


def test_an_address_that_is_too_long_is_no_message_that_is():
    """Some servers give it the status of a message that is too big."""
    assert [decide("552 5.3.4 Address too long", stage).scope for stage in (MAIL, RCPT)] == [
        Scope.MESSAGE,
        Scope.RECIPIENT,
    ]


def test_too_many_messages_sent_is_said_of_a_session_by_452_alone():
    """A new connection cures nothing that is refused with a 5xx, and would meet the same limit again."""
    assert action("452 Too many messages sent", MAIL) == "RECONNECT"
    assert action("554 5.7.1 Too many messages sent", END) == "RETRY"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("452 4.1.1 <bob@example.com> too many recent messages", "RETRY"),
        ("450 4.2.1 Rate limit exceeded, try again later", "RETRY"),
        ("421 4.7.1 Messages to bob@example.com deferred due to excessive volume", "RECONNECT"),
    ],
)
def test_a_rate_with_a_mailbox_s_status_is_that_recipient_s(line, expected):
    """At RCPT, x.1.1 and x.2.1 are about the mailbox, whatever is too much."""
    decision = decide(line)
    assert (decision.action.name, decision.scope, decision.rule.slower) == (expected, Scope.RECIPIENT, False)
    assert decide("450 4.2.1 You are sending too many emails too fast.").scope is Scope.SERVER


@pytest.mark.parametrize("text", ["Mailbox is frozen", "Cannot reach mailbox", "Recipient not accepting messages"])
def test_a_shut_mailbox_is_that_recipient_s_even_at_the_end(text):
    """Other recipients of the same message may have it."""
    for code, expected in ((450, Action.RETRY), (550, Action.FAIL)):
        decision = decide(f"{code} {text}", END)
        assert (decision.action, decision.scope, decision.rule.patience) == (expected, Scope.RECIPIENT, None)


@pytest.mark.parametrize(
    ("found", "heard"),
    [
        ("unverified", "connect to mx.example.net[192.0.2.1]:25: Connection refused"),
        (
            "unverified",
            "host mx.example.net[192.0.2.1] said: 450 4.7.1 Too many connections from your IP, try again later",
        ),
        (
            "undeliverable",
            "host mx.example.net[192.0.2.1] said: 550 5.7.1 Client host [192.0.2.9] blocked, see spamhaus",
        ),
        ("undeliverable", "host mx.example.net[192.0.2.1] said: 530 5.7.0 Authentication required"),
    ],
)
def test_what_a_server_quotes_of_another_is_about_the_recipient(found, heard):
    """Postfix asks the recipient's own server; what that one has against it is nothing that this client does."""
    line = f"{{code}} <bob@example.com>: Recipient address rejected: {found} address: {heard}"
    for code, expected in (("450 4.1.1", Action.RETRY), ("550 5.1.1", Action.FAIL)):
        decision = decide(line.format(code=code))
        assert (decision.action, decision.scope, decision.rule.slower) == (expected, Scope.RECIPIENT, False)


def test_what_a_server_says_of_its_client_concerns_the_server():
    """Postfix refuses a client at RCPT, and would for every other recipient; a log-in may change its mind."""
    line = "554 5.7.1 <mx[192.0.2.1]>: Client host rejected: Access denied"
    assert (decide(line).action, decide(line).scope) == (Action.AUTHENTICATE, Scope.SERVER)
    suspicious = "421 4.7.0 [192.0.2.1] this message is suspicious due to the low reputation of the sending domain"
    assert decide(suspicious, END).scope is Scope.MESSAGE


@pytest.mark.parametrize(
    ("line", "stage", "concerned"),
    [
        ("554 5.0.0 The subscriber has moved away", END, Scope.RECIPIENT),
        ("550 5.7.2 This mailing list is closed", END, Scope.RECIPIENT),
        ("451 4.3.0 Delivery to bob@example.com is suspended", END, Scope.RECIPIENT),
        ("550 5.7.1 Unacceptable HELO", MAIL, Scope.SERVER),
        ("550 Host banned", RCPT, Scope.SERVER),
        ("554 5.7.1 Connection refused by policy", END, Scope.SERVER),
        ("450 4.7.0 Back off", MAIL, Scope.SERVER),
        ("421 Not today", MAIL, Scope.SERVER),
        ("421 Unknown sender, not today", MAIL, Scope.MESSAGE),
        ("421 4.1.8 Unable to find valid MX record for app@example.org", MAIL, Scope.MESSAGE),
        ("421 4.7.1 Domain example.org is temporarily refused", MAIL, Scope.MESSAGE),
        ("421 4.3.0 message is too large to process at this time", MAIL, Scope.MESSAGE),
        ("554 5.3.0 unknown mailer error 255", RCPT, Scope.RECIPIENT),
        ("450 4.4.1 mx.example.com connection refused", RCPT, Scope.RECIPIENT),
        ("450 4.1.1 <bob@example.com>: the mailbox's host is not listed", RCPT, Scope.RECIPIENT),
        ("451 4.3.0 milter connection refused", END, Scope.MESSAGE),
        ("451 4.7.1 Message rejected: URL host listed", END, Scope.MESSAGE),
        ("451 4.7.1 The text contains a blacklisted host", END, Scope.MESSAGE),
        ("451 4.6.0 Line too long for the SMTP protocol", END, Scope.MESSAGE),
        ("450 4.7.1 Connections not allowed now", MAIL, Scope.SERVER),
        ("450 <bob@example.com>: Recipient address rejected: Host banned", RCPT, Scope.SERVER),
        ("451 Cannot connect to 127.0.0.1: the filter is down", END, Scope.SERVER),
        ("550 5.7.1 A recipient's copy of this message was quarantined", END, Scope.MESSAGE),
        ("554 5.6.0 Report spam to abuse for bob@example.com", END, Scope.MESSAGE),
        ("550 5.7.1 Host banned for the contents", END, Scope.MESSAGE),
        ("554 Transaction failed", END, Scope.MESSAGE),
        ("554 Transaction failed", RCPT, Scope.RECIPIENT),
    ],
)
def test_whom_it_names_where_nothing_else_tells(line, stage, concerned):
    """A recipient that is named after the data, or this client at any time, is who it is about; else the stage tells."""
    assert decide(line, stage).scope is concerned


def test_before_the_first_rcpt_nothing_is_about_a_recipient():
    """At MAIL an unknown user is the sender: it concerns the message."""
    assert decide("550 5.1.1 User unknown", MAIL).scope is Scope.MESSAGE
    assert decide("554 5.7.1 Sender address rejected", Stage.CONNECT).scope is Scope.SERVER
    assert decide("450 4.2.1 User unknown", Stage.CONNECT).scope is Scope.SERVER


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("550 5.7.1 Service unavailable; client [192.0.2.1] blocked using zen.spamhaus.org", "FAIL"),
        (
            "550 5.7.1 <bob@example.com>... Rejected: IP in SpamCop blacklist, see: http://spamcop.net/bl.shtml?192.0.2.1",
            "FAIL",
        ),
        ("554 Your access to this mail system has been rejected due to the sending MTA's poor reputation.", "FAIL"),
        ("550 5.7.606 Access denied, banned sending IP [192.0.2.1]", "FAIL"),
        ("450 4.7.1 Your IP has been temporarily blocked, try again in 10 minutes", "RETRY"),
        ("450 4.7.1 Client host rejected: Service unavailable", "RETRY"),
        ("421 sorry, your IP (192.0.2.1) is temporarily denied (#4.7.1)", "RECONNECT"),
        ("421 4.3.0 Temporary System Problem. Try again later (10).", "RECONNECT"),
        ("553 5.7.2 [TSS09] All messages from 192.0.2.9 will be permanently deferred", "FAIL"),
        ("550 5.7.511 Access denied, banned sender[192.0.2.5]. To be removed, see https://sender.example.com/", "FAIL"),
        ("554 Your IP is sending to too many unknown users", "FAIL"),
        ("451 too many errors detected from your IP (192.0.2.9)", "RETRY"),
        ("504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname", "FAIL"),
        ("554 5.7.1 Service unavailable; Helo command [mail.example.com] blocked using dbl.example.org", "FAIL"),
        ("550 5.7.25 Reverse DNS validation failed.", "FAIL"),
        ("451 4.1.8 Fix reverse DNS for 192.0.2.232", "RETRY"),
        ("554 Sending suspended: Account is paused for sending.", "FAIL"),
        ("550 5.7.1 Your account has been blocked", "FAIL"),
        ("451 4.7.1 Insufficient credits", "RETRY"),
        ("454 4.7.0 Too many login attempts, please try again later.", "RETRY"),
        ("550 5.7.1 Hosts with dynamic IP addresses are not accepted", "FAIL"),
        ("554 Client 192.0.2.5 is not welcome here", "FAIL"),
        ("554 5.7.1 mail from your host is not accepted here", "FAIL"),
        ("550 Ihre IP-Adresse wurde gesperrt", "FAIL"),
        ("554 5.7.1 <mx[192.0.2.1]>: Client host rejected: blocked using bl.example.com", "FAIL"),
        ("501 5.7.1 message rejected, you are listed in bl.example.com", "FAIL"),
        ("554 mx.example.com IP: 192.0.2.1, You are not allowed to send us mail", "FAIL"),
        ("554 Too many unknown RCPT TO addresses from host", "FAIL"),
        ("451 too many invalid recipients", "RETRY"),
        ("554 5.7.1 Rejected because Bad IP", "FAIL"),
        ("501 5.7.1 <bob@example.com> Sender IP must resolve", "FAIL"),
        ("550 5.7.0 HELO foo.test from RFC2606 reserved domain", "FAIL"),
        ("550 5.7.0 HELO argument [host] is missing a DNS entry", "FAIL"),
        ("421 4.1.2 <bob@example.com>: Recipient address rejected: No reverse name for your IP address", "RECONNECT"),
        ("550 5.7.1 client [192.0.2.1] blocked using Cloudmark Sender Intelligence", "FAIL"),
        ("550 5.7.1 Your account is not authorized to use this service", "FAIL"),
        ("550 Votre adresse IP est bloquée", "FAIL"),
        ("450 4.7.1 You are on our temporary blocklist for 2 hours", "RETRY"),
        ("550 5.7.1 rejected: 192.0.2.9 is a known spam source", "FAIL"),
        ("550 5.7.1 Your server is not authorised to send to us", "FAIL"),
        ("550 5.7.501 Access denied, spam abuse detected", "FAIL"),
        ("554 5.7.1 Insufficient balance to send", "FAIL"),
        ("452 Too many open files", "RETRY"),
        ("554 5.7.1 Mail server at 192.0.2.20 may not send mail, see PBL", "FAIL"),
        ("554 5.7.1 192.0.2.77 found on one or more RBLs", "FAIL"),
        ("550 5.7.1 You are listed as an open proxy", "FAIL"),
        ("550 5.7.1 Poor sender reputation for 192.0.2.7", "FAIL"),
        ("452 4.3.4 Resources temporarily exhausted", "RETRY"),
        ("450 4.7.1 Too many hard bounces from your account, wait", "RETRY"),
        ("450 4.7.1 maintenance ongoing, try again later", "RETRY"),
        ("451 4.3.5 Server configuration problem", "RETRY"),
        ("553 sorry, your HELO/EHLO greeting is in my badhelo list (#5.7.1)", "FAIL"),
        ("450 Your SMTP account is not yet activated", "RETRY"),
        ("554 Your mail account (bob) was compromised.", "FAIL"),
        ("554 Too many invalid commands", "FAIL"),
        ("550 5.7.1 Sending server not trusted", "FAIL"),
        ("550 Connection from 192.0.2.1 rejected", "FAIL"),
        ("550 Not accepting mail from this host", "FAIL"),
        ("550 5.7.0 Client is spamming", "FAIL"),
        ("550 192.0.2.1 does not resolve", "FAIL"),
        ("451 4.7.0 192.0.2.5 host can't be resolved", "RETRY"),
        ("550 not allowed to send from this IP", "FAIL"),
        ('550 "REJECTED - Bad HELO - Host impersonating [mail.example.net]"', "FAIL"),
        ("554 5.7.1 The sending server does not have a reverse (address-to-name) DNS entry", "FAIL"),
        ("451 4.3.0 Queue is full, try later", "RETRY"),
        ("550 5.7.1 We accept no connections from hosting providers", "FAIL"),
        ("550 5.7.1 Spammers are not welcome", "FAIL"),
        ("451 4.7.0 IP under observation, retry in 1 hour", "RETRY"),
        ("550 5.7.1 Bad behaviour (Connection IP address:192.0.2.5)", "FAIL"),
        ("550 5.7.2 <192.0.2.9>: Sender IP rejected: too much spam", "FAIL"),
        ("550 DNS blacklisted: rejected", "FAIL"),
        ("535 Invalid password", "FAIL"),
        ("550 Domain is suspended from outbound SMTP access", "FAIL"),
    ],
)
def test_a_block_of_the_client_concerns_the_server(line, expected):
    """Whatever was being said at the time, every other send meets it too."""
    for stage in (MAIL, RCPT, DATA, END):
        decision = decide(line, stage)
        assert (decision.action.name, decision.scope) == (expected, Scope.SERVER)


@pytest.mark.parametrize(
    "line",
    [
        "554 5.7.1 Blocked: URL in message body listed on dbl.spamhaus.org",
        "550 5.7.1 likely suspicious due to the very low reputation of the sending domain.",
        "553 5.3.0 Sender domain blacklisted",
        "550 Sender address blocked",
        "554 5.7.1 This email from IP 192.0.2.1 has been rejected. The email message was detected as spam",
        "550 5.7.1 [192.0.2.1] blocked: this looks like spam",
        "554 5.7.1 192.0.2.7: Your mail is blocked automatically by anti-spam system.",
        "550 5.7.1 We consider HTML to be spam, even if you are not a spammer",
        "554 5.7.7 Boundary error in your message, are you a spammer?",
        "550 Mail content denied [MxY2 IP: 192.0.2.5]",
        "550 5.7.1 Message refused, see https://example.com/why?ip=192.0.2.5",
    ],
)
def test_a_block_of_what_is_sent_does_not_concern_the_server(line):
    """A link, a sender or a content on a list is the message's own trouble."""
    decision = decide(line, END)
    assert (decision.action, decision.scope) == (Action.FAIL, Scope.MESSAGE)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("554 5.7.1 <app@example.com>: Sender address rejected: Access denied", "FAIL"),
        ("450 4.7.1 <app@example.com>: Sender address rejected: unverified address", "RETRY"),
        ("450 4.1.8 <app@example.com>: Sender address rejected: Domain not found", "RETRY"),
        ("550 5.7.23 <bob@example.com>: Recipient address rejected: SPF check failed", "FAIL"),
        ("451 4.7.32 Rate limited because there is no DMARC alignment", "RETRY"),
        ("550 Sending domain not found", "FAIL"),
        ("550 mail from app@example.com is rejected", "FAIL"),
        ("535 5.7.1 Sender address not owned by user", "FAIL"),
        ("550 Not authorized to send as app@example.com", "FAIL"),
        ("554 5.7.1 Recipient address rejected: user name bob and sender do not match", "FAIL"),
        ("550 Sender has no A, AAAA, or MX DNS records.", "FAIL"),
        ("550-Postmaster verification failed while checking <app@example.com>", "FAIL"),
        ("421 invalid sender domain 'example.com' (misconfigured dns?)", "RECONNECT"),
    ],
)
def test_what_is_about_the_sender_concerns_the_message(line, expected):
    """Postfix refuses a sender at RCPT, and would refuse it for every other recipient, too."""
    for stage in (MAIL, RCPT, END):
        decision = decide(line, stage)
        assert (decision.action.name, decision.scope, decision.rule.slower) == (expected, Scope.MESSAGE, False)


def test_what_is_unavailable_at_rcpt_may_be_greylisting():
    """A pause of the whole client for each new recipient would never end."""
    assert decide("451 Service temporarily unavailable, try again later", MAIL).scope is Scope.SERVER
    assert decide("451 Service temporarily unavailable, try again later", RCPT).scope is Scope.RECIPIENT


def test_a_non_ascii_address_concerns_whom_it_belongs_to():
    """Whichever command named it: the other recipients can be written in ASCII."""
    line = "553 5.6.7 Must declare SMTPUTF8 to send unicode address"
    assert [decide(line, stage).scope for stage in (MAIL, RCPT)] == [Scope.MESSAGE, Scope.RECIPIENT]


def test_452_to_mail_is_no_452_to_rcpt():
    """Without a word, it is a full disk at MAIL and a full transaction at RCPT."""
    assert action("452", MAIL) == "RETRY"
    assert action("452 4.3.1 Insufficient system storage", RCPT) == "RETRY"


@pytest.mark.parametrize(
    ("line", "wait", "scope"),
    [
        ("452 4.2.2 The email account that you tried to reach is over quota.", 900, Scope.RECIPIENT),
        ("450 Mailbox full", 900, Scope.RECIPIENT),
        ("454 Throttling failure: Daily message quota exceeded", 600, Scope.SERVER),
        ("450 4.1.8 <app@example.com>: Sender address rejected: Domain not found", 300, Scope.MESSAGE),
        ("452 4.3.1 Insufficient system storage", 300, Scope.SERVER),
        ("450 4.2.0 <bob@example.com>: Recipient address rejected: Greylisted, see example.org", None, Scope.RECIPIENT),
        ("450 4.7.1 Error: too much mail from 192.0.2.1", 3, Scope.SERVER),
        ("451 4.4.5 High load, try again later", None, Scope.SERVER),
        ("451 Service temporarily unavailable, please try again later", None, Scope.RECIPIENT),
        ("451 Temporary local problem", None, Scope.RECIPIENT),
    ],
)
def test_kinds_of_trouble_differ_in_how_long_they_last(line, wait, scope):
    """Rows say how long: a mailbox is cleared later than the DNS is back, and the backoff is made for greylisting."""
    decision = decide(line)
    assert (decision.action, decision.rule.wait, decision.scope) == (Action.RETRY, wait, scope)


# --- Words against codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "450 4.2.0 <bob@example.com>: Greylisted for 300 seconds",
        "550 5.7.1 <bob@example.com>: greylisted, try again later",
        "554 Greylisting in action",
        "454 Falha temporaria, politica SoftFail (greylisting). (#5.7.1)",
        "451 4.7.1 You do not seem to have a reverse DNS entry. You are greylisted for 20 minutes.",
        "450 4.1.1 <bob@example.com>: Recipient address rejected: unverified address: still verifying",
        "450 4.1.1 <bob@example.com>: Recipient address rejected: unverified address: Connection timed out",
        "451 4.7.25 Temporary error validating reverse DNS.",
        "450 4.2.1 Mailbox disabled, not accepting messages",
        "451 4.3.5 Server configuration problem",
        "450 4.1.8 <app@example.com>: Sender address rejected: Domain not found",
        "554 Your message was received but it could not be saved. Please retry later.",
        "554 5.0.0 Error: transaction failed: dial tcp: lookup smtp.example.com: i/o timeout",
        "554 5.5.0 Error: transaction timeout",
        "550 connect ECONNREFUSED 192.0.2.1:587",
    ],
)
def test_what_passes_is_waited_for(line):
    """Greylisting, a check under way, a relay without a network, and what the server calls temporary."""
    assert action(line) == "RETRY"


@pytest.mark.parametrize(
    ("line", "patience", "cure"),
    [
        ("450 4.1.1 <bob@example.com>: Recipient address rejected: User unknown in virtual alias table", 14400, True),
        ("450 unknown user", 14400, True),
        ("451 Invalid Recipient", 14400, True),
        ("451 See https://cr.yp.to/docs/smtplf.html.", 600, False),
        ("451 LF not preceded by a CR, your SMTP client is broken.", 600, False),
        ("451 Bare line-feed; see http://haraka.github.io/barelf/", 600, False),
        ("403 You are not authorized to send from that email address", 600, True),
        (
            "440 mail from account doesn't conform with authentication (Auth Account:a@x.cn|Mail Account:b@x.cn)",
            600,
            True,
        ),
        ("450 4.7.25 Client host rejected: cannot find your hostname, [192.0.2.1]", 86400, True),
        ("450 4.7.1 Client host rejected: cannot find your reverse hostname, [192.0.2.1]", 86400, True),
        ("450 4.7.1 <kitty.example>: Helo command rejected: Host not found", 86400, True),
        ("450 4.7.1 Access denied. IP name lookup failed [192.0.2.1]", 86400, True),
        ("454 4.7.0 Invalid base64 data", None, False),
        ("450 5.1.1 no such thing", 14400, False),
        ("450 4.1.10 null MX", None, False),
        ("451 4.4.7 Delivery time expired", None, False),
        ("450 4.7.30 REQUIRETLS support required", None, False),
    ],
)
def test_nothing_transient_is_made_final_on_a_guess(line, patience, cure):
    """The first digit is believed: it is tried again, for a while, and where it lasts the cure is told."""
    decision = decide(line)
    assert (decision.action, decision.rule.patience, bool(decision.rule.cure)) == (Action.RETRY, patience, cure)


@pytest.mark.parametrize(
    "line",
    [
        "550 5.1.1 <bob@example.com>: Recipient address rejected: User unknown",
        "552 5.2.2 Mailbox full",
        "554 5.4.4 dial tcp: lookup mx.nosuch.example: no such host",
        "552 5.3.4 Message size exceeds fixed limit",
        "523 Message length (123456 bytes) exceeds administrative limit.",
        "550 The sending IP (192.0.2.1) is listed. Please resolve this and retry.",
        "552 5.2.2 The mailbox is full. Create a shorter message body or remove attachments and try sending it again.",
        "554 The domain is not reachable. Please check the domain and try again (-1915321397:308:-2147467259)",
        "550 5.7.28 There is an unusual rate of unsolicited mail originating from your IP address.",
        "553 5.7.1 [TSS09] All messages from 192.0.2.1 will be permanently deferred; Retrying will NOT succeed.",
        "530 From/Sender name is not valid",
        "503 5.5.1 Invalid command: Must not issue an AUTH command now",
        "554 4.4.7 Message expired: unable to deliver in 840 minutes.",
        "550 4.2.0 contradictory",
        "550 This server only accepts mail for local recipients",
        "550 Too many invalid recipients in this session",
        "550 Mail from temporary email addresses is not accepted",
        "554 5.7.1 User bob@example.com should log in to enable receiving the mail",
        "501 5.7.11 Syntax error (no parameters allowed)",
        "523 5.7.10 SMTP protocol violation, no commands allowed to pipeline after STARTTLS.",
        "550",
    ],
)
def test_a_refusal_that_means_it_is_final(line):
    """Advice to repair something and try again, and numbers of messages, are no promise that waiting helps."""
    assert action(line) == "FAIL"


@pytest.mark.parametrize(
    ("line", "stage", "reason"),
    [
        ("502 Command not implemented", MAIL, "does not know the command"),
        ("502 5.5.1 Not implemented, try again later", MAIL, "does not know the command"),
        ("554 5.5.0 Syntax error in the body, try again later", END, "does not take the line, or the bytes"),
        ("554 5.4.7 Delivery time expired", END, "gave up after its own retries"),
        ("550 5.7.30 REQUIRETLS support required", MAIL, "gave up after its own retries, or cannot give"),
        ("552 5.3.4 Too much for one day: limit of 10 MB per day", MAIL, "larger than"),
        ("550 Message too big!", MAIL, "larger than"),
        ("550 5.7.26 This mail is deferred", END, "fails SPF, DKIM, DMARC or reverse DNS"),
        ("550 SPF check failed, try again later", END, "does not pass SPF, DKIM or DMARC"),
        ("550 5.7.57 Anonymous submission", MAIL, "Exchange takes mail from clients that are logged in"),
        ("550 5.7.64 TenantAttribution; Relay Access Denied", RCPT, "inside its own organisation"),
        ("552 5.2.2 Mailbox full, try again later", RCPT, "mailbox is full"),
        ("535 5.7.8 Authentication failed", AUTH, "user name or the password"),
        ("550 5.1.8 Sender domain not found", MAIL, "sender's address is wrong"),
        ("550 5.1.1 xyzzy", RCPT, "no such mailbox or domain"),
        ("550 No such user here", RCPT, "no such mailbox"),
        ("554 Blocked using zen.spamhaus.org", RCPT, "block list"),
        ("554 5.6.0 xyzzy", END, "does not take this content"),
        ("554 5.7.1 xyzzy", END, "policy forbids"),
        ("503 Bad sequence of commands", DATA, "at the wrong moment"),
        ("552 message line is too long", END, "longer than the server takes"),
        ("500 Line too long", END, "longer than the server takes"),
        ("502 5.7.0 Your SMTP account is not yet activated. Please contact us", MAIL, "may not send"),
        (
            "554 Message rejected: Email address is not verified. The following identities failed the check",
            END,
            "verified",
        ),
        ("554 Message rejected: Stream is more than 10485760 bytes long.", END, "larger than"),
        ("553 Relaying disallowed as app@example.com", END, "from this sender"),
        ("553 Mail from must equal authorized user", MAIL, "from this sender"),
        ("554 5.2.0 STOREDRV.Submission.Exception:SendAsDeniedException.MapiExceptionSendAsDenied", END, "this sender"),
        ("554 5.2.0 STOREDRV.Submission.Exception:OutboundSpamException; verdict is RefuseQuota", END, "may not send"),
        ("550 4.2.0 xyzzy", RCPT, "contradict each other"),
        ("452 4.3.1 Full", MAIL, "disk or memory is full"),
        ("452 Insufficient system storage", MAIL, "disk or memory is full"),
        ("451 Too many concurrent connections here", MAIL, "enough connections"),
        ("450 Server busy", MAIL, "overloaded"),
        ("451 4.4.5 xyzzy", MAIL, "overloaded"),
        ("451 4.4.2 Timeout - closing connection", END, "closes this connection"),
    ],
)
def test_a_refusal_is_told_with_its_reason(line, stage, reason):
    """Kinds of refusals have a reason of their own, and one that means it is no less final for a "later" in it."""
    decision = decide(line, stage)
    assert reason in decision.rule.why
    if line[0] == "5" and "Exchange takes mail from clients" not in reason:
        assert decision.action is Action.FAIL


@pytest.mark.parametrize("code", [400, 450, 499])
@pytest.mark.parametrize("stage", Stage)
def test_a_4xx_that_nobody_knows_comes_again(code, stage):
    """The first digit decides where nothing else does."""
    assert action(f"{code} xyzzy", stage) == "RETRY"


@pytest.mark.parametrize("code", [505, 550, 599])
@pytest.mark.parametrize("stage", Stage)
def test_a_5xx_that_nobody_knows_is_final(code, stage):
    """The first digit decides where nothing else does."""
    assert action(f"{code} xyzzy", stage) == "FAIL"


def test_the_rules_of_an_application_come_first():
    """A row in front of the table decides before it."""
    mine = Rule(code=550, text="over for today", action=Action.RETRY, wait=7200, why="They open at eight.")
    policy = RetryPolicy(rules=(mine, *DEFAULT_RULES), give_up_after=None)
    reply = Reply.parse("550 5.7.1 Over for today")
    assert policy.decide(reply, RCPT).rule is mine
    assert policy.decide(reply, RCPT).wait == 7200
    assert policy.decide(Reply.parse("550 5.7.1 Over"), RCPT).action is Action.FAIL
