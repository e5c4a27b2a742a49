"""``explain``: what smtpretry would do about a reply, and why."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any

from smtpretry.policy import OWN_REFUSAL
from smtpretry.replies.delays import duration
from smtpretry.replies.patterns import caseless
from smtpretry.replies.reply import NO_REPLY, READ, Reply
from smtpretry.replies.rule import WAITING, Action, Rule
from smtpretry.replies.rules import usual_stage
from smtpretry.replies.stage import Stage
from smtpretry.replies.tables import described

from . import UNREADABLE, policies, wrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from smtpretry.policy import Decision, RetryPolicy

_CODE = re.compile(r"\d{3}")
_GOES_ON = re.compile(r"\d{3}-")
_LISTED = 200  # attempts that a schedule lists at most: a policy may know no end

_OUR_OWN = (
    r"\bsmtp [a-z].{0,400}?: (?:\S{1,255} says )?(?P<stage>CONNECT|EHLO|STARTTLS|AUTH|MAIL|RCPT|DATA|END_OF_DATA): "
)
_OUR_END = r"(?: -> (?P<action>[A-Z_]+)(?: in \S+ s)?)?(?: \(delivery [^()]*\))?$"

# smtpretry, where no reply came: smtp has no connection to ... yet, ...: CONNECT: no reply (Connection refused)
_SILENCE = re.compile(rf"(?:^\s*|{_OUR_OWN})no reply \((?P<why>.*?)\){_OUR_END}")

# Where a reply stands in a line of a mail log or of a traceback, and what tells the stage there.
_IN_LOGS = (
    # smtpretry: smtp reply decided: RCPT: 450 4.2.0 Greylisted -> RETRY in 300 s (delivery 3f2a, to bob@example.com)
    re.compile(rf"{_OUR_OWN}(?P<reply>\d{{3}}[ -].*?){_OUR_END}"),
    # Postfix: (host mx[192.0.2.1] said: 450 4.2.0 Greylisted (in reply to RCPT TO command))
    re.compile(r"\bsaid: (?P<reply>\d{3}[ -].*?)(?: \(in reply to (?P<stage>[\w ]+?)(?: command)?\))?\)*$"),
    re.compile(r"\b(?P<stage>refused to talk to me): (?P<reply>\d{3}[ -].*?)\)*$"),
    # Exim: SMTP error from remote mail server after RCPT TO:<bob@example.com>: 450 4.2.0 Greylisted
    re.compile(
        r"\bafter (?:pipelined )?"
        r"(?P<stage>initial connection|EHLO|HELO|STARTTLS|AUTH|MAIL FROM|RCPT TO|DATA|end of data)\b"
        r".{0,300}?: (?P<reply>\d{3}[ -].*)"
    ),
    # Sendmail: stat=Deferred: 450 4.2.0 Greylisted
    re.compile(r"\bstat=\w[\w ]{0,40}: (?P<reply>\d{3}[ -].*)"),
    # Python: aiosmtplib.errors.SMTPRecipientRefused: (450, '4.2.0 Greylisted', 'bob@example.com')
    re.compile(
        r"(?:\bSMTP(?P<stage>SenderRefused|RecipientRefused|RecipientsRefused|DataError|HeloError|AuthenticationError"
        r"|ConnectError|ConnectResponseError)\b.{0,300}?)?\((?P<code>\d{3}), b?(?P<quote>['\"])(?P<text>.*?)(?P=quote)"
    ),
    # Anything: a code and its enhanced status
    re.compile(r"(?:^|[\s:;>\"'(\[])(?P<reply>[45]\d\d[ -][245]\.\d{1,3}\.\d{1,3}\b.*)"),
)
_STAGES = {
    "refused to talk to me": Stage.CONNECT,
    "initial connection": Stage.CONNECT,
    "ehlo": Stage.EHLO,
    "helo": Stage.EHLO,
    "starttls": Stage.STARTTLS,
    "auth": Stage.AUTH,
    "mail from": Stage.MAIL,
    "rcpt to": Stage.RCPT,
    "data": Stage.DATA,
    "end of data": Stage.END_OF_DATA,
    "connecterror": Stage.CONNECT,
    "connectresponseerror": Stage.CONNECT,
    "heloerror": Stage.EHLO,
    "authenticationerror": Stage.AUTH,
    "senderrefused": Stage.MAIL,
    "recipientrefused": Stage.RCPT,
    "recipientsrefused": Stage.RCPT,
    "dataerror": Stage.END_OF_DATA,
} | {stage.value.lower(): stage for stage in Stage}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    explain = commands.add_parser(
        "explain",
        help="say what a reply means",
        description="Say what replies mean: action, scope, wait, the row of the table, its reason and source.",
    )
    explain.add_argument("reply", nargs="*", metavar="REPLY", help="a reply; none: one a line from standard input")
    explain.add_argument(
        "--stage", type=_stage, help=f"when it was said ({', '.join(_dashed(stage) for stage in Stage)}); else guessed"
    )
    policies.add_to(explain)
    explain.add_argument("--schedule", action="store_true", help="list when it would be tried, until it is given up")
    explain.add_argument("--json", action="store_true", help="one JSON object a line")
    explain.set_defaults(run=_explain)


def _dashed(stage: Stage) -> str:
    return stage.name.lower().replace("_", "-")


def _stage(name: str) -> Stage:
    try:
        return Stage[name.upper().replace("-", "_")]
    except KeyError:
        msg = f"{name!r} is none of {', '.join(_dashed(stage) for stage in Stage)}"
        raise argparse.ArgumentTypeError(msg) from None


def _explain(options: argparse.Namespace) -> int:
    code = 0
    given = _unsplit(options.reply)
    for number, line in _whole(given or (line.rstrip("\r\n") for line in sys.stdin)):
        if not line.strip() and not given:
            continue
        try:
            reply, told, fails = _read(line)
        except ValueError as error:
            sys.stdout.flush()
            print(f"{'argument' if options.reply else 'line'} {number}: {error}", file=sys.stderr)
            code = UNREADABLE
            continue
        stage, stage_is = _when(options.stage, told, reply)
        facts = _facts(options.policy, reply, stage, stage_is, fails=fails)
        if options.schedule and facts["action"]:
            facts["schedule"], facts["then"] = _schedule(options.policy, reply, stage, first=facts["wait"])
        print(json.dumps(facts, ensure_ascii=False) if options.json else "\n".join(_lines(facts)))
    return code


def _unsplit(words: list[str]) -> list[str]:
    """The arguments; a reply that the shell has split, for want of quotes, is one."""
    split = len(words) > 1 and not any(" " in word for word in words) and not all(map(_CODE.fullmatch, words))
    return [" ".join(words)] if split and _CODE.fullmatch(words[0]) else words


def _whole(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Each line and its number; those of a multi-line reply, all but the last of which have a hyphen, are one."""
    begun, whole = 0, ""
    for number, line in enumerate(lines, start=1):
        code = whole[:3]
        if whole and line.startswith((f"{code}-", f"{code} ")):
            whole += f"\n{line}"
        else:
            if whole:
                yield begun, whole
            begun, whole = number, line
        if not _GOES_ON.match(line) or f" {whole[:3]} " in whole:
            yield begun, whole
            whole = ""
    if whole:
        yield begun, whole


def _read(line: str) -> tuple[Reply, Stage | None, bool]:
    """The reply that a line is or holds, the stage where the line tells it, and whether this side has given up."""
    if silence := _SILENCE.search(line.rstrip()):
        stage = _STAGES.get((silence["stage"] or "").lower())
        return Reply.of(NO_REPLY, silence["why"]), stage, silence["action"] == Action.FAIL.value
    try:
        return Reply.parse(line), None, False
    except ValueError:
        for pattern in _IN_LOGS:
            if (found := pattern.search(line.rstrip())) is None:
                continue
            groups = found.groupdict()
            code = groups.get("code")
            text = groups.get("reply") or f"{code} {groups['text']}"
            text = text.replace("\\n", f"\n{code} " if code else "\n")
            try:
                return Reply.parse(text), _STAGES.get((groups.get("stage") or "").lower()), False
            except ValueError:
                continue
        raise


def _when(given: Stage | None, told: Stage | None, reply: Reply) -> tuple[Stage, str]:
    """The stage, and how it is known."""
    if given:
        return given, "given"
    return (told, "told") if told else (usual_stage(reply), "guessed")


def _schedule(policy: RetryPolicy, reply: Reply, stage: Stage, *, first: float) -> tuple[list[int], str]:
    """The seconds from the first attempt to each, where the server says the same each time; and what follows."""
    times, elapsed, attempt = [0], 0.0, 1
    able, mended = set(Action), set[Rule]()
    while len(times) < _LISTED:
        decision = policy.decide(reply, stage, able=able, attempt=attempt, elapsed=elapsed)
        if decision.action is Action.FAIL:
            return times, "then it fails"
        if decision.action not in WAITING:
            able.remove(decision.action)  # a repair is made at once, and once
            times.append(round(elapsed))
            continue
        at_once = decision.wait == 0 and decision.rule not in mended
        mended.add(decision.rule)
        wait = decision.wait if decision.wait or at_once else policy.backoff(attempt=attempt, elapsed=elapsed)
        if policy.gives_up(attempt=attempt, elapsed=elapsed, wait=wait, rule=decision.rule):
            return times, "then it is given up"
        elapsed += first if len(times) == 1 and decision.wait else wait  # another draw of the jitter is another number
        attempt += not at_once
        times.append(round(elapsed))
    return times, "and so on"


def _facts(policy: RetryPolicy, reply: Reply, stage: Stage, told: str, *, fails: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "reply": str(reply),
        "code": reply.code,
        "enhanced": reply.enhanced,
        "text": reply.text,
        "stage": stage.name,
        "stage_is": told,
    }
    if NO_REPLY < reply.code < 400:  # noqa: PLR2004 - RFC 5321 §4.2.1
        return facts | {"action": None, "why": "The server accepts: nothing to do.", "source": "RFC 5321 §4.2.1"}
    decision = policy.decide(reply, stage)
    if fails and decision.action is not Action.FAIL:
        decision = OWN_REFUSAL
    limits = {"this row's": decision.rule.patience or math.inf, "give_up_after": policy.patience}
    whose = min(limits, key=limits.__getitem__)
    is_limited = decision.action is not Action.FAIL and limits[whose] < math.inf
    rule, said = decision.rule, reply.text[:READ].replace("\n", " ")
    return facts | {
        "action": decision.action.name,
        "otherwise": _otherwise(policy, decision, reply, stage),
        "scope": decision.scope.name,
        "wait": round(decision.wait),
        "wait_is": _wait_is(decision, reply),
        "slower": rule.slower,
        "fewer": rule.fewer,
        "patience": rule.patience,
        "limit": limits[whose] if is_limited else None,
        "limit_is": whose if is_limited else None,
        "name": rule.name,
        "row": next((number for number, row in enumerate(policy.rules, start=1) if row is rule), None),
        "rows": len(policy.rules),
        "matches": described(rule)["reply"],
        "words": found[0] if rule.text and (found := caseless(rule.text).search(said)) else None,
        "why": rule.why,
        "cure": rule.cure,
        "source": rule.source,
    }


def _otherwise(policy: RetryPolicy, decision: Decision, reply: Reply, stage: Stage) -> str | None:
    """What happens where the session cannot do the action."""
    able = frozenset(Action) - {decision.action}
    if decision.action in (*WAITING, Action.FAIL):
        return None
    return policy.decide(reply, stage, able=able).action.name


def _wait_is(decision: Decision, reply: Reply) -> str | None:
    if decision.action not in WAITING:
        return None
    if reply.retry_after is not None:
        return "named by the server"
    if decision.rule.wait is None or decision.rule.wait not in (0, decision.wait):
        return "the backoff before the second attempt"
    return "nothing to wait for" if decision.rule.wait == 0 else "this row's"


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    yield facts["reply"]
    if facts["action"] is None:
        yield f"    {facts['why']}"
        return
    otherwise = f" (or {facts['otherwise']}, where the session cannot)" if facts["otherwise"] else ""
    yield f"    action  {facts['action']}{otherwise}"
    yield f"    scope   {facts['scope']}"
    if facts["wait_is"]:
        then = "; the client slows down" * facts["slower"] + "; it uses fewer connections for a while" * facts["fewer"]
        yield f"    wait    {facts['wait']} s ({facts['wait_is']}){then}"
    if facts["limit"]:
        yield f"    for     {duration(facts['limit'])} at most ({facts['limit_is']})"
    if "schedule" in facts:
        yield from wrapped("tried", f"{', '.join(['now', *map(_at, facts['schedule'][1:])])}; {facts['then']}")
    hint = "; --stage says another" if facts["stage_is"] == "guessed" else ""
    yield f"    stage   {facts['stage']} ({facts['stage_is']}{hint})"
    yield from wrapped("why", facts["why"])
    if facts["cure"]:
        yield from wrapped("cure", facts["cure"])
    if facts["source"]:
        yield from wrapped("source", facts["source"])
    row = f"{facts['row']} of {facts['rows']}" if facts["row"] else "none: what holds where no row matches"
    name = f"{facts['name']}, " if facts["name"] else ""
    words = f": {facts['words']!r}" if facts["words"] else ""
    yield f"    row     {name}{row} ({facts['matches']}{words})"


def _at(time: int) -> str:
    return duration(time) if time else "at once"
