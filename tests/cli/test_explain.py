"""`python -m smtpretry` tells what the table says about a reply, for people and for machines."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smtpretry.__main__ import main
from smtpretry.replies.rules import DEFAULT_RULES
from smtpretry.replies.tables import kinds_table, markdown_table

GREYLISTED = "450 4.2.0 <bob@example.com>: Greylisted for 300 seconds"


@pytest.fixture
def explain(capsys, monkeypatch):
    """Run `explain` on arguments or on standard input; gives exit code, standard output and standard error."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(["explain", *arguments])
        return code, *capsys.readouterr()

    return run


def facts(explain, *arguments, stdin=""):
    code, out, err = explain("--json", *arguments, stdin=stdin)
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_a_reply_is_explained(explain):
    """Action, scope, wait, stage, reason, source and row, in a few lines."""
    code, out, err = explain(GREYLISTED)
    row = next(number for number, rule in enumerate(DEFAULT_RULES, start=1) if "Greylisting" in rule.why)
    assert (code, err) == (0, "")
    assert [re.sub(r"\s+", " ", line).strip() for line in out.splitlines()] == [
        GREYLISTED,
        "action RETRY",
        "scope RECIPIENT",
        "wait 300 s (named by the server)",
        "for 1 h at most (give_up_after)",
        "stage RCPT (guessed; --stage says another)",
        f"why {DEFAULT_RULES[row - 1].why}",
        f"source {DEFAULT_RULES[row - 1].source}",
        f"row greylisted, {row} of {len(DEFAULT_RULES)} (4xx, 5xx by its words: 'Greylist')",
    ]


def test_the_same_for_machines(explain):
    """One JSON object a line, with the same facts."""
    (fact,) = facts(explain, GREYLISTED)
    assert fact["row"] in range(1, len(DEFAULT_RULES) + 1)
    assert fact | {"row": 0, "why": "", "source": ""} == {
        "reply": GREYLISTED,
        "code": 450,
        "enhanced": "4.2.0",
        "text": "<bob@example.com>: Greylisted for 300 seconds",
        "stage": "RCPT",
        "stage_is": "guessed",
        "action": "RETRY",
        "otherwise": None,
        "scope": "RECIPIENT",
        "wait": 300,
        "wait_is": "named by the server",
        "slower": False,
        "fewer": False,
        "patience": 86400,
        "limit": 3600,
        "limit_is": "give_up_after",
        "name": "greylisted",
        "row": 0,
        "rows": len(DEFAULT_RULES),
        "matches": "4xx, 5xx by its words",
        "words": "Greylist",
        "why": "",
        "cure": "",
        "source": "",
    }


@pytest.mark.parametrize("stage", ["rcpt", "RCPT", "mail", "end-of-data", "END_OF_DATA", "connect"])
def test_the_stage_can_be_told(explain, stage):
    """In any case, with a hyphen or an underscore."""
    (fact,) = facts(explain, "452", "--stage", stage)
    assert (fact["stage"], fact["stage_is"]) == (stage.upper().replace("-", "_"), "given")
    assert fact["action"] == ("SPLIT" if stage.lower() == "rcpt" else "RETRY")


@pytest.mark.parametrize(
    ("reply", "stage"),
    [
        ("535 5.7.8 Authentication failed", "AUTH"),
        ("454 4.7.0 Temporary authentication failure", "AUTH"),
        ("454 4.7.1 Relay access denied", "RCPT"),
        ("530 5.7.0 Authentication required", "MAIL"),
        ("550 5.1.1 User unknown", "RCPT"),
    ],
)
def test_a_stage_that_nobody_tells_is_guessed(explain, reply, stage):
    """By the code; and the output says that it is a guess."""
    (fact,) = facts(explain, reply)
    assert (fact["stage"], fact["stage_is"]) == (stage, "guessed")


POSTFIX = "Nov 24 09:00:00 mx postfix/smtp[42]: 4F1: to=<bob@example.com>, relay=mx[192.0.2.1]:25, delay=1, status="
OURS = "WARNING:smtpretry:smtp "
TO = "(delivery 3f2a, to bob@example.com)"
EXIM = "1qXy-0004 == bob@example.com R=dnslookup T=remote_smtp defer (-44): SMTP error from remote mail server after "


@pytest.mark.parametrize(
    ("line", "reply", "stage"),
    [
        (f"{POSTFIX}deferred (host mx[192.0.2.1] said: 450 a b (in reply to RCPT TO command))", "450 a b", "RCPT"),
        (f"{POSTFIX}bounced (host mx said: 550-a 550 b (in reply to end of DATA command))", "550 a b", "END_OF_DATA"),
        (f"{POSTFIX}deferred (host mx[192.0.2.1] refused to talk to me: 421 4.3.2 busy)", "421 4.3.2 busy", "CONNECT"),
        (f"{EXIM}RCPT TO:<bob@example.com>: 450 4.2.0 Greylisted", "450 4.2.0 Greylisted", "RCPT"),
        (f"{EXIM}pipelined MAIL FROM:<a@b>: 452 full", "452 full", "MAIL"),
        (f"{EXIM}end of data: 554 spam", "554 spam", "END_OF_DATA"),
        ("sendmail[7]: to=<bob@example.com>, dsn=4.2.0, stat=Deferred: 450 4.2.0 a", "450 4.2.0 a", None),
        ("aiosmtplib.errors.SMTPDataError: (554, '5.7.1 Spam\\n5.7.1 no')", "554 5.7.1 Spam 5.7.1 no", "END_OF_DATA"),
        ("smtplib.SMTPSenderRefused: (530, b'5.7.0 Log in', 'a@b')", "530 5.7.0 Log in", "MAIL"),
        ("smtplib.SMTPRecipientsRefused: {'b@x': (450, b'4.2.0 Wait')}", "450 4.2.0 Wait", "RCPT"),
        ("X: [SMTPRecipientRefused(450, '4.2.0 Wait', 'b@x')]", "450 4.2.0 Wait", "RCPT"),
        ("smtplib.SMTPAuthenticationError: (535, b'5.7.8 no')", "535 5.7.8 no", "AUTH"),
        (f"{EXIM}end of data: 550-5.7.1 a\\n550 5.7.1 b", "550 5.7.1 a 5.7.1 b", "END_OF_DATA"),
        ("refused by the server: 550 5.1.1 User unknown", "550 5.1.1 User unknown", None),
        (f"{OURS}reply decided: RCPT: 550 5.1.1 <e@x>: who? -> FAIL {TO}", "550 5.1.1 <e@x>: who?", "RCPT"),
        (f"{OURS}send waits 300 s, until 2026-11-25 23:04:56: MAIL: 451 a (b) {TO}", "451 a (b)", "MAIL"),
        (
            f"{OURS}server left alone for 60 s, until 23:00: mx:25 says CONNECT: 421 4.3.2 Busy",
            "421 4.3.2 Busy",
            "CONNECT",
        ),
    ],
    ids=[
        *("rcpt", "data", "banner", "exim", "exim-mail", "exim-data", "sendmail", "aiosmtplib", "smtplib"),
        *("smtplib-recipients", "aiosmtplib-recipient", "smtplib-log-in", "exim-lines", "any"),
        *("ours-decided", "ours-waits", "ours-paused"),
    ],
)
def test_a_reply_is_found_in_a_line_of_a_log(explain, line, reply, stage):
    """Postfix, Exim, sendmail, Python and smtpretry wrap it in their own ways, and most tell the stage."""
    (fact,) = facts(explain, stdin=line + "\n")
    assert fact["reply"] == reply
    assert (fact["stage"], fact["stage_is"]) == (stage, "told") if stage else fact["stage_is"] == "guessed"


@pytest.mark.parametrize(
    ("line", "stage", "action", "row"),
    [
        ("no reply (Connection lost)", "RCPT", "RECONNECT", "no-reply"),
        (f"{OURS}has no connection to mx:25 yet, and tries again in 1 s, at 2026-11-26 03:00:00: CONNECT: no reply (timed out)", "CONNECT", "RECONNECT", "no-reply"),
        (f"{OURS}server left alone for 60 s, until 2026-11-26 03:00:00: mx:25 says CONNECT: no reply (Connection lost)", "CONNECT", "RECONNECT", "no-reply"),
        (f"{OURS}reply decided: END_OF_DATA: no reply (lost after 451 4.3.0 wait) -> RECONNECT in 3 s {TO}", "END_OF_DATA", "RECONNECT", "no-reply"),
        (f"{OURS}reply decided: STARTTLS: no reply (certificate verify failed) -> FAIL {TO}", "STARTTLS", "FAIL", "bad-certificate"),
        (f"{OURS}reply decided: STARTTLS: no reply (the server offers no TLS) -> FAIL {TO}", "STARTTLS", "FAIL", "own-refusal"),
    ],
)  # fmt: skip
def test_a_line_about_a_silence_is_explained(explain, line, stage, action, row):
    """Where our own log says that no reply came, it is explained what that leads to, and what this side has given up."""
    (said,) = facts(explain, line)
    assert (said["code"], said["stage"], said["action"], said["name"]) == (-1, stage, action, row)


def test_many_replies_come_from_standard_input(explain):
    """One a line; empty lines do not count."""
    replies = facts(explain, stdin=f"{GREYLISTED}\n\n530 Authentication required\r\n421 bye")
    assert [fact["action"] for fact in replies] == ["RETRY", "AUTHENTICATE", "RECONNECT"]


def test_a_reply_of_several_lines_is_one(explain):
    """Pasted as it came, with or without CR, it is explained once; the next reply is another one."""
    pasted = "550-5.1.1 The mailbox\r\n550-5.1.1 that you tried\r\n550 5.1.1 is not there\r\n550 5.1.1 Nor this\r\n"
    replies = facts(explain, stdin=f"{pasted}452-4.2.2 cut off\n{GREYLISTED}\n421-a\n421 b")
    assert [fact["reply"] for fact in replies] == [
        "550 5.1.1 The mailbox 5.1.1 that you tried 5.1.1 is not there",
        *("550 5.1.1 Nor this", "452 4.2.2 cut off", GREYLISTED, "421 a b"),
    ]


def test_a_reply_without_quotes_is_one(explain):
    """Whoever forgets the quotes gets the reply explained, not its words."""
    (fact,) = facts(explain, *GREYLISTED.split())
    assert fact["reply"] == GREYLISTED
    assert [fact["code"] for fact in facts(explain, "450", "550")] == [450, 550]


def test_a_line_without_a_reply_is_named_and_the_others_are_explained(explain):
    """The error names line and cause on standard error, and the exit code is 2 at the end."""
    code, out, err = explain(stdin="450 one\nhello\n999 two\n451 three\n")
    assert code == 2
    assert out.count("action") == 2
    assert err.splitlines() == [
        "line 2: no reply: 'hello' does not begin with a three-digit code, a space and a text",
        "line 3: no reply: its code is from 200 to 599, not 999",
    ]


def test_an_argument_without_a_reply_is_named(explain):
    """An empty argument too."""
    code, out, err = explain("", "450 one")
    assert code == 2
    assert "RETRY" in out
    assert err == "argument 1: no reply: the line is empty\n"


def test_what_a_session_cannot_do_is_told(explain):
    """A repair has a way out: what happens where there are no credentials, or no TLS."""
    assert "AUTHENTICATE (or FAIL, where the session cannot)" in explain("554 5.7.1 Relay access denied")[1]
    assert "AUTHENTICATE (or RETRY, where the session cannot)" in explain("454 4.7.1 Relay access denied")[1]
    assert "SPLIT (or RETRY, where the session cannot)" in explain("452 4.5.3 Too many recipients")[1]


@pytest.mark.parametrize(
    ("reply", "wait_is"),
    [
        ("450 xyzzy", "the backoff before the second attempt"),
        ("452 4.2.2 over quota", "this row's"),
        ("421 idle", "nothing to wait for"),
        ("550 5.1.1 User unknown", None),
    ],
)
def test_where_the_wait_comes_from_is_told(explain, reply, wait_is):
    """The server, the row, or the backoff."""
    (fact,) = facts(explain, reply)
    assert fact["wait_is"] == wait_is


def test_a_slower_pace_and_a_cure_are_told(explain):
    """What the client changes by itself, and what a person can do where it lasts."""
    out = explain("454 Maximum sending rate exceeded")[1]
    assert "wait    1 s (this row's); the client slows down" in out
    assert "stage   END_OF_DATA (guessed" in out
    out = explain("421 4.7.0 Too many connections")[1]
    assert "; it uses fewer connections for a while" in out
    assert "stage   CONNECT (guessed" in out
    out = explain("450 4.7.25 Client host rejected: cannot find your hostname")[1]
    assert "cure    Give the sending host a PTR record" in out
    assert "row     no-name, " in out


# --- The schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_lists_the_attempts_until_the_end(explain):
    """By the policy's own waits, the last attempt on its deadline; in seconds for machines."""
    _, out, _ = explain("--schedule", "450 4.2.0 busy")
    tried = re.search(r"tried +now, 1 min( \d s)?, 3 min.*, 1 h; then it is given up", re.sub(r"\s+", " ", out))
    assert tried
    (fact,) = facts(explain, "--schedule", "450 4.2.0 busy")
    assert fact["then"] == "then it is given up"
    assert fact["schedule"][0] == 0
    assert fact["schedule"] == sorted(fact["schedule"])
    assert fact["schedule"][-1] == 3600
    assert len(fact["schedule"]) == 8


@pytest.mark.parametrize(
    ("reply", "times", "then"),
    [
        ("550 5.1.1 User unknown", [0], "then it fails"),
        ("530 5.7.0 Authentication required", [0, 0], "then it fails"),
        ("421 idle for too long", [0, 0, 60], None),
        ("450 4.2.0 Greylisted for 300 seconds", [0, 300, 600, 900], None),
        ("450 4.2.0 Greylisted for 2 hours", [0], "then it is given up"),
        ("454 4.7.1 Relay access denied", [0, 0, 60], "then it is given up"),
    ],
)
def test_the_schedule_is_what_a_client_would_do(explain, reply, times, then):
    """A repair comes at once and once, a named delay is kept, what is final is not tried again."""
    (fact,) = facts(explain, "--schedule", reply)
    assert fact["schedule"][: len(times)] == [pytest.approx(time, abs=7) for time in times]
    assert fact["then"] == (then or "then it is given up")
    if reply.startswith("454"):
        assert fact["schedule"][-1] == 600


def test_an_acceptance_has_no_schedule(explain):
    """Nothing is tried after a 250."""
    assert "tried" not in explain("--schedule", "250 2.0.0 Ok")[1]


def test_a_schedule_without_an_end_is_cut(explain, own_policy):
    """A policy that never gives up goes on."""
    (fact,) = facts(explain, "--policy", "own_policy:endless", "--schedule", "450 busy")
    assert (fact["then"], len(fact["schedule"])) == ("and so on", 200)


# --- A policy of one's own --------------------------------------------------------------------------------------------


@pytest.fixture
def own_policy(tmp_path, monkeypatch):
    """A module in the current directory that holds policies and what is none."""
    (tmp_path / "own_policy.py").write_text(
        "from smtpretry import Action, DEFAULT_RULES, RetryPolicy, Rule\n"
        "mine = Rule(name='over-for-today', code=550, text='over', action=Action.RETRY, wait=120, why='Closed.')\n"
        "policy = RetryPolicy(rules=(mine, *DEFAULT_RULES))\n"
        "endless = RetryPolicy(give_up_after=None)\n"
        "class settings:\n    mail = policy\n"
        "def make():\n    return policy\n"
        "def broken():\n    raise RuntimeError('no settings')\n"
        "number = 5\n",
        encoding="utf-8",
    )
    (tmp_path / "broken_module.py").write_text("import nowhere_to_be_found\n", encoding="utf-8")
    (tmp_path / "raising_module.py").write_text("raise RuntimeError('no settings')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("own_policy", "raising_module"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("where", ["own_policy:policy", "own_policy:settings.mail", "own_policy:make"])
def test_a_policy_of_ones_own_explains(explain, own_policy, where):
    """Its rules come first, and their names, waits and reasons are told."""
    (fact,) = facts(explain, "--policy", where, "550 Over for today")
    assert (fact["action"], fact["name"], fact["wait"], fact["row"]) == ("RETRY", "over-for-today", 120, 1)
    _, out, _ = explain("--policy", where, "550 Over for today")
    assert f"row     over-for-today, 1 of {len(DEFAULT_RULES) + 1} (550 by its words: 'Over')" in out
    assert "source" not in out


def test_a_policy_of_ones_own_is_printed(own_policy, capsys):
    """`rules` shows its rows too."""
    assert main(["rules", "--policy", "own_policy:policy"]) == 0
    assert capsys.readouterr().out.startswith("  1  over-for-today: 550 by its words; at: any stage\n")


@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("nowhere:policy", "there is no module nowhere: run this where Python finds it, or set PYTHONPATH"),
        ("own_policy.deeper:policy", "there is no module own_policy.deeper: run this"),
        ("own_policy:polcy", "own_policy has no polcy"),
        ("own_policy:settings.male", "own_policy has no settings.male"),
        ("own_policy:number", "own_policy:number is no RetryPolicy, its type is int"),
        ("own_policy:broken", "own_policy:broken() failed: RuntimeError: no settings"),
        ("own_policy", "'own_policy' is no module:name, such as app.mail:policy"),
        ("own_policy:", "'own_policy:' is no module:name"),
        (":policy", "':policy' is no module:name"),
        ("", "'' is no module:name"),
        ("broken_module:policy", "broken_module cannot be imported: No module named 'nowhere_to_be_found'"),
        ("raising_module:policy", "raising_module cannot be imported: RuntimeError: no settings"),
        (".own_policy:policy", ".own_policy cannot be imported"),
    ],
)
def test_a_policy_that_cannot_be_had_is_named(explain, own_policy, capsys, where, cause):
    """The error says what is missing, and the exit code is 2."""
    with pytest.raises(SystemExit) as error:
        explain("--policy", where, "450 busy")
    assert error.value.code == 2
    assert cause in capsys.readouterr().err


def test_an_unknown_reply_has_a_reason_too(explain):
    """Where no row matches, what holds is told."""
    _, out, _ = explain("450 xyzzy")
    assert "RFC 5321 §4.2.1" in out
    assert "none: what holds where no row matches" in out


def test_an_acceptance_is_no_refusal(explain):
    """There is nothing to do about a 250."""
    assert explain("250 2.0.0 Ok") == (0, "250 2.0.0 Ok\n    The server accepts: nothing to do.\n", "")
    (fact,) = facts(explain, "250 2.0.0 Ok")
    assert fact["action"] is None


def test_an_unknown_stage_is_refused(explain, capsys):
    """The error names the stages."""
    with pytest.raises(SystemExit) as error:
        explain("450", "--stage", "quit")
    assert error.value.code == 2
    assert "'quit' is none of connect, ehlo, starttls, auth, mail, rcpt, data, end-of-data" in capsys.readouterr().err


def test_the_table_is_printed(capsys):
    """Every row with its number, reason and source; with --patterns its words too."""
    assert main(["rules"]) == 0
    plain = capsys.readouterr().out
    unwrapped = re.sub(r"\s+", " ", plain)
    for number, rule in enumerate(DEFAULT_RULES, start=1):
        assert re.search(rf"^ *{number}  {rule.name}: ", plain, re.MULTILINE)
        assert f"{rule.why} [{rule.source}]" in unwrapped
    assert r"\b" not in plain
    assert main(["rules", "--patterns"]) == 0
    assert r"text: \bgr[ea]y[- ]?list" in capsys.readouterr().out


def test_the_table_is_written_into_a_page(capsys, tmp_path):
    """Between the marks, again and again, and nothing else of the page changes."""
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- rules -->\nold\n<!-- /rules -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert main(["rules", "--into", str(page)]) == 0
        text = page.read_text(encoding="utf-8")
        assert text == f"before\n<!-- rules -->\n{markdown_table()}<!-- /rules -->\nafter\n"
    page.write_text("<!-- kinds -->\n<!-- /kinds -->\n<!-- rules -->\n<!-- /rules -->\n", encoding="utf-8")
    assert main(["rules", "--into", str(page)]) == 0
    both = f"<!-- kinds -->\n{kinds_table()}<!-- /kinds -->\n<!-- rules -->\n{markdown_table()}<!-- /rules -->\n"
    assert page.read_text(encoding="utf-8") == both
    assert main(["rules", "--kinds"]) == 0
    assert capsys.readouterr().out == kinds_table()
    assert main(["rules", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_table()


def test_a_page_without_marks_is_left_alone(capsys, tmp_path):
    """The error names the file and what is missing."""
    page = tmp_path / "README.md"
    page.write_text("nothing here\n", encoding="utf-8")
    assert main(["rules", "--into", str(page)]) == 2
    assert f"{page}: no line <!-- rules -->" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "nothing here\n"


def test_a_page_keeps_its_line_ends(tmp_path):
    """Windows' too."""
    page = tmp_path / "README.md"
    page.write_bytes(b"before\r\n<!-- rules -->\r\nold\r\n<!-- /rules -->\r\nafter\r\n")
    assert main(["rules", "--into", str(page)]) == 0
    written = page.read_bytes()
    assert written.startswith(b"before\r\n<!-- rules -->\r\n| name |")
    assert written.count(b"\n") == written.count(b"\r\n")


def test_a_page_that_cannot_be_read_is_named(capsys, tmp_path):
    """A folder, and what is no UTF-8."""
    page = tmp_path / "README.md"
    page.write_bytes(b"<!-- rules -->\n\xff\n<!-- /rules -->\n")
    for path, said in ((tmp_path, "Is a directory"), (page, "'utf-8' codec can't decode")):
        assert main(["rules", "--into", str(path)]) == 2
        assert f"{path}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--markdown", "--patterns"], "not allowed with argument"),
        (["--into", "README.md", "--kinds"], "not allowed with argument"),
        (["--kinds", "--policy", "own_policy:policy"], "leave --policy out"),
        (["--into", "README.md", "--policy", "own_policy:policy"], "leave --policy out"),
    ],
)
def test_options_that_do_not_go_together_are_told(own_policy, capsys, options, said):
    """None is passed over in silence."""
    try:
        code = main(["rules", *options])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain '450 busy'", "rules", "rules --markdown"])
def test_a_full_disk_is_told_in_a_line(command: str) -> None:
    """With an exit code of 2, and no traceback."""
    line = f"{shlex.quote(sys.executable)} -m smtpretry {command} >/dev/full"
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["/bin/sh", "-c", line], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"[Errno 28] No space left on device\n")


def run(*arguments, stdin=b"", **environment):
    return subprocess.run(
        [sys.executable, "-m", "smtpretry", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env={"PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


def test_any_bytes_may_come_and_any_terminal_may_read():
    """A log that is no UTF-8 on a terminal that knows ASCII alone does no harm."""
    done = run("explain", stdin=b"450 Gr\xfc\xdfe \x1b[31m\n", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"action  RETRY" in done.stdout
    assert b"\x1b" not in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    """`explain | head -1` ends without a word."""
    with subprocess.Popen(
        [sys.executable, "-m", "smtpretry", "explain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(b"450 busy\n" * 2000)
    assert err == b""


@pytest.mark.parametrize("closed", [">&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["explain", "explain '450 busy'", "rules"])
def test_a_stream_that_is_closed_from_the_beginning_is_an_empty_one(command: str, closed: str) -> None:
    """As a service manager may start it: there is no traceback, and nothing is read or printed."""
    line = f"{shlex.quote(sys.executable)} -m smtpretry {command} {closed}"
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["/bin/sh", "-c", line], env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_readme_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The example in the README is what the command prints."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"\$ python -m smtpretry (explain .*)\n((?:.*\n)+?)```", readme).groups()
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown
