"""`Reply` reads what servers say, and only that: code, enhanced status, clean text, and the delay that it names."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smtpretry.replies.reply import NO_REPLY, Reply

MESSY = st.text(st.characters(), max_size=400)  # lone surrogates, controls and all
WORDS = """450 4.2.0 5.1.1 (#5.7.1) greylisted try again wait retry in for after late later per last an hour minutes
seconds s h 5 10 1,5 00:05:00 -1 0 bob@example.com https://example.com/5 192.0.2.1 : ( ) , . !"""
FRAGMENTS = st.sampled_from([*WORDS.split(), "\n", "\r", "\t", "", "\x1b[31m"])
SENTENCES = st.lists(FRAGMENTS, max_size=40).map(" ".join)

HOSTILE = {
    "cues": "try again " * 3200,
    "durations": "1 hour 2 minutes " * 2000,
    "almost durations": "try in 5 m, wait 5 m, in 5 " * 1200,
    "greylisting": "greylisted " * 3000,
    "numbers": "1 " * 16000,
    "digits": "1" * 32000,
    "clocks": "1:1:" * 8000,
    "statuses": "(#5.1." * 5400,
    "status lines": "5.5.5 \n" * 4500,
    "dots": "try again " + "a." * 16000,
    "escapes": "\x1b[" * 16000,
    "titles": "\x1b]" * 16000,
    "returns": "\r" * 32000,
    "spaces": " " * 32000,
    "line feeds": "\n" * 32000,
    "codes": "450-" * 8000,
    "at signs": "@" * 32000,
}


def read(text):
    return Reply.of(450, text).retry_after


# --- Taking it apart --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "enhanced", "text"),
    [
        ("450 4.2.0 Greylisted for 300 seconds", 450, "4.2.0", "Greylisted for 300 seconds"),
        ("450 Greylisted", 450, None, "Greylisted"),
        ("250 2.1.5 Ok", 250, "2.1.5", "Ok"),
        ("450", 450, None, ""),
        ("450 ", 450, None, ""),
        ("450-", 450, None, ""),
        ("450 4.2.0", 450, "4.2.0", ""),
        ("  421 4.3.2 shutting down\r\n", 421, "4.3.2", "shutting down"),
        ("554 5.7.1.2 no status", 554, None, "5.7.1.2 no status"),
        ("554 192.0.2.1 is listed", 554, None, "192.0.2.1 is listed"),
        ("554 4.16.50 of something", 554, "4.16.50", "of something"),
        (
            "550 sorry, no mailbox here by that name (#5.1.1)",
            550,
            "5.1.1",
            "sorry, no mailbox here by that name (#5.1.1)",
        ),
        ("550 '5.1.1 <bob@example.com>... User unknown'", 550, "5.1.1", "'5.1.1 <bob@example.com>... User unknown'"),
        ("550 5.7.1: denied", 550, "5.7.1", "5.7.1: denied"),
        ("450 4.2.1 Please try again later. (#id-5.9.4)", 450, "4.2.1", "Please try again later. (#id-5.9.4)"),
    ],
)
def test_a_line_is_taken_apart(line, code, enhanced, text):
    """Code, enhanced status and text of a line are told apart; what is no status stays in the text."""
    assert Reply.parse(line) == Reply(code, enhanced, text)


@pytest.mark.parametrize(
    "lines",
    [
        "550-5.1.1 No such user.\r\n550-5.1.1 Check the address.\r\n550 5.1.1 See our page.",
        "550-5.1.1 No such user.\n550-5.1.1 Check the address.\n550 5.1.1 See our page.",
        "550-5.1.1 No such user. 550-5.1.1 Check the address. 550 5.1.1 See our page.",
    ],
    ids=["wire", "lines", "log"],
)
def test_a_multi_line_reply_is_one_text(lines):
    """The lines of a reply, as they came or as a mail log joins them, lose code and status and keep their breaks."""
    assert Reply.parse(lines) == Reply(550, "5.1.1", "No such user.\nCheck the address.\nSee our page.")


def test_lines_that_do_not_repeat_the_status_stay_whole():
    """Where the status leads the first line only, it is known and the text is what the server wrote."""
    reply = Reply.of(550, "5.7.1 Denied.\nSee our page.")
    assert reply == Reply(550, "5.7.1", "5.7.1 Denied.\nSee our page.")
    assert reply.message == "5.7.1 Denied.\nSee our page."


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("", "the line is empty"),
        (" \r\n", "the line is empty"),
        ("Greylisted", "does not begin with a three-digit code"),
        ("45 Greylisted", "does not begin with a three-digit code"),
        ("4500 Greylisted", "does not begin with a three-digit code"),
        ("450Greylisted", "does not begin with a three-digit code"),
        ("٤٥٠ Greylisted", "does not begin with a three-digit code"),
        ("199 no", "from 200 to 599, not 199"),
        ("600 no", "from 200 to 599, not 600"),
        ("000 no", "from 200 to 599, not 0"),
    ],
)
def test_what_is_no_reply_is_refused_with_the_cause(line, cause):
    """A line that is no reply is a ValueError that says why."""
    with pytest.raises(ValueError, match=re.escape(cause)):
        Reply.parse(line)


@pytest.mark.parametrize("code", [-1, 0, 199, 600, 4500])
def test_an_impossible_code_is_no_reply(code):
    """A code that no server can send, such as aiosmtplib's -1, stands for silence and keeps what happened as text."""
    assert Reply.of(code, "Malformed SMTP response: b'x'") == Reply(NO_REPLY, None, "Malformed SMTP response: b'x'")


def test_bytes_are_read_as_smtplib_holds_them():
    """What smtplib's errors hold is read as well, and bytes that are no UTF-8 do no harm."""
    assert Reply.of(450, b"4.2.0 Greylisted f\xfcr 5 Minuten") == Reply(450, "4.2.0", "Greylisted f\ufffdr 5 Minuten")


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("\x1b[2J\x1b[31mred\x1b[0m alert", "red alert"),
        ("\x1b]0;owned\x07title", "title"),
        ("one\rtwo\x00three\x7ffour\ttab", "one two three four tab"),
        ("\u202egnp.exe\u202c and \u200bzero\ufeff", "gnp.exe and zero"),
        ("Gr\udcfc\udce4e", "Gr\ufffd\ufffde"),
        ("one\u2028two\u0085three", "one two three"),
        ("one\r\ntwo", "one\ntwo"),
        ("äöü 日本語 🐈", "äöü 日本語 🐈"),
    ],
)
def test_a_text_can_do_no_harm(dirty, clean):
    """Terminal escapes, controls, direction marks and undecodable bytes are gone; letters of any language stay."""
    reply = Reply.of(450, dirty)
    assert reply.text == clean
    reply.text.encode()


# --- Putting it together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "4.2.0 Greylisted",
        "4.2.0 One\n4.2.0 two",
        "4.2.0 One\ntwo",
        "no such user (#5.1.1)",
        "5.1.1 no such user (#5.1.1)",
        "5.1.1",
        "5.7.1: denied",
        "",
        "no status",
    ],
)
def test_the_message_is_what_the_server_wrote(message):
    """The enhanced status stands in the message where it stood, and nowhere twice."""
    assert Reply.of(550, message).message == message


def test_a_reply_made_by_hand_has_its_status_on_each_line():
    """The message of a reply that an application makes reads as a server's."""
    assert Reply(450, "4.2.0", "Greylisted\nTry later").message == "4.2.0 Greylisted\n4.2.0 Try later"


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (Reply(450, "4.2.0", "Greylisted\nfor long"), "450 4.2.0 Greylisted 4.2.0 for long"),
        (Reply(421), "421"),
        (Reply(NO_REPLY, text="Connection lost"), "no reply (Connection lost)"),
        (Reply(NO_REPLY), "no reply"),
    ],
)
def test_a_reply_is_one_line_in_a_log(reply, line):
    """However many lines it had, and where nothing was said."""
    assert str(reply) == line


def test_a_long_text_is_cut_in_a_log():
    """A server cannot fill the log: the line is cut, and shows that it is."""
    line = str(Reply(550, "5.7.1", "x" * 32000))
    assert len(line) < 600
    assert line.endswith("x…")


@given(message=MESSY | SENTENCES, code=st.integers(-2, 700))
@example(message="5.1.1 \n", code=550)
@example(message="\ud800", code=550)
@settings(deadline=None)
def test_nothing_that_a_server_says_raises(message, code):
    """Whatever came over the wire, each view of it works, is clean, and can be written."""
    reply = Reply.of(code, message)
    assert reply.code == (code if 200 <= code <= 599 else NO_REPLY)
    for text in (reply.text, reply.message, str(reply)):
        text.encode()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "\n" not in str(reply)
    assert reply.retry_after is None or 0 < reply.retry_after <= 5 * 86400


@given(message=MESSY | SENTENCES, code=st.integers(200, 599))
@settings(deadline=None)
def test_a_reply_survives_its_message(message, code):
    """`Reply.of(reply.code, reply.message)` is the same reply: nothing is lost where it is stored and read again."""
    reply = Reply.of(code, message)
    assert Reply.of(code, reply.message) == reply


@given(text=MESSY | SENTENCES, code=st.integers(200, 599))
@settings(deadline=None)
def test_a_single_line_survives_a_log(text, code):
    """`Reply.parse(str(reply))` is the same reply, for a reply of one line that is not cut."""
    reply = Reply.of(code, text.replace("\n", " "))
    assert Reply.parse(str(reply)) == reply


@given(line=MESSY | SENTENCES)
@settings(deadline=None)
def test_parsing_raises_nothing_but_a_value_error(line):
    """A line of a log is a reply, or a ValueError."""
    try:
        assert Reply.parse(line).code in range(200, 600)
    except ValueError as error:
        assert str(error).startswith("no reply: ")  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_costs_next_to_nothing(text):
    """32 KB of the worst that a server can say are read, cleaned and searched in far less than 100 ms."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        reply = Reply.of(450, text)
        assert str(reply)
        assert reply.retry_after in {None, 60.0, 300.0, 3720.0}
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1


# --- The delay that a text names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        # for
        ("Greylisted for 300 seconds", 300),
        ("<bob@example.com>: Recipient address rejected: Greylisted for 5 minutes. Try again later.", 300),
        ("You have been graylisted for 1 minute, see https://example.com/3/days", 60),
        ("Your address is temporarily blocked for 1 hour", 3600),
        ("Deferred for the next 15 minutes", 900),
        ("Account locked for 2h", 7200),
        # in, after
        ("please retry in 52 minutes 3 seconds.", 3123),
        ("try again after 1800 seconds", 1800),
        ("Resend message in an hour.", 3600),
        ("Try again in half an hour", 1800),
        ("You cannot connect for 0.99 more days.", 85536),
        ("Try again in 5 more minutes", 300),
        ("Please wait one more hour", 3600),
        ("Blocked for 2 further hours", 7200),
        ("You are not allowed to send for 3 hours", 10800),
        ("not allowed to send more e-mails within 24 hours.After 24 hours,you can send e-mails as usual.", 86400),
        ("Too many messages. In 10 minutes you may send again", 600),
        ("Please try sending again in about 3 minutes", 180),
        ("Try again later (300 seconds)", 300),
        ("In 5 minutes try again.", 300),
        ("Limit expires in 45 seconds", 45),
        ("Quota resets in 3h20m", 12000),
        ("will be accepted after 5 min", 300),
        ("next attempt in 2 minute(s)", 120),
        # wait, delay
        ("please wait 60 sec", 60),
        ("wait at least 5 minutes before retrying", 300),
        ("delay: 30s", 30),
        ("Greylisting (5 min)", 300),
        ("Back off for 2 minutes", 120),
        # remaining
        ("Greylisted, 45 seconds remaining", 45),
        ("greylisted; remaining time: 290 s", 290),
        ("early retry (173s missing)", 173),
        # a machine's way
        ("Retry-After: 120", 120),
        ("throttled; retry_after=300", 300),
        ("retry in 250 ms", 0.25),
        ("please come back in 00:05:00", 300),
        ("too many connections, later in 7 seconds", 7),
        ("Please Come Back in 00:02:00 [minutes]", 120),
        ("resend in 4:30 minutes", 270),
        # compound, ranges, fractions
        ("retry in 23 hours 59 minutes 59 seconds", 86399),
        ("retry in 1 day, 2 hours and 3 minutes", 93780),
        ("retry in 14m59s", 899),
        ("retry in 14m : 59s", 840),
        ("retry in 1 hour(s) 5 minute(s)", 3900),
        ("retry in 5-10 minutes", 600),
        ("retry in 1.5 hours", 5400),
        ("retry in 1,800 seconds", 1800),
        ("retry in 1,5 hours", 5400),
        ("retry in 5 days", 432000),
        # other languages
        ("Bitte versuchen Sie es in 5 Minuten erneut", 300),
        ("Veuillez réessayer dans 10 minutes", 600),
        ("Inténtelo de nuevo en 15 minutos", 900),
        ("Riprova tra un minuto", 60),
        ("Повторите попытку через 5 минут", 300),
    ],
)
def test_the_delay_that_a_server_names_is_read(text, seconds):
    """Whichever way it is put, a delay is known in seconds."""
    assert read(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        # limits and their windows
        "max 100 emails per hour",
        "192.0.2.1 has exceeded 10 messages per 15 minutes",
        "exceeded 100 messages in 1 hour, try later",
        "limit of 500 recipients in 60 minutes reached; try again",
        "rate overlimit = 25.3 / 1h",
        "limited to 10 messages for 5 minutes",
        "max number of messages (10) over past 24h reached",
        "only one message every 30 seconds",
        "has exceeded the max defers and failures per hour (5/5 (100%)) allowed",
        # what is over
        "too many errors in the last 10 minutes",
        "Message expired: unable to deliver in 840 minutes",
        "retry timeout exceeded after 5 days",
        "timeout after 300 seconds",
        "greylisted: first seen 30 seconds ago",
        "Too many retries in 10 minutes",
        # counters, ids, addresses, links, times of day
        "Please try again later (10)",
        "Please try again later. OFR_999 [999]",
        "Greylisted, see https://example.com/wait/5/minutes",
        "Try again later from [192.0.2.5]. (AS77712344)",
        "blocked: bob@5.minutes.example",
        "Greylisted, expected wait unknown; queue id 5E4300C0",
        "Problem report: Time: (Nov 02 11:59:39)",
        "try again after 14:05:33 UTC",
        "try again after 14:05:33",
        "Wait and send again, please",
        "please resend e-mail shortly",
        # vague
        "try again in a few minutes",
        "not allowed to send more than 10 e-mails within 24 hours",
        "you cannot send more than 50 messages for the last 2 hours",
        "your mail could not be sent for 3 days",
        "try again in a moment",
        "blocked for the day",
        # insane
        "retry in 0 seconds",
        "retry in -5 minutes",
        "retry in 6 days",
        "retry in 99999999 seconds",
        "Greylisted for 2 weeks",
        "",
    ],
)
def test_what_is_no_delay_is_none(text):
    """Numbers that say something else, vague words and senseless delays are left to the backoff."""
    assert read(text) is None


def test_a_delay_across_lines_is_read():
    """A multi-line reply may break within the phrase."""
    assert Reply.parse("450-4.2.0 Greylisted, try again in\n450 4.2.0 5 minutes").retry_after == 300
