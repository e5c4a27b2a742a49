r"""The table: which reply means what. All knowledge of replies stands here, and nowhere else.

The law, in the order of evidence; within the table the first match wins:

1.  **Silence and hang-ups.** No valid reply, and 421 at any stage, are about the connection whatever else is said.
2.  **The enhanced status**, where it can mean one thing only (RFC 3463, 5248, 7372, 7504, 7505, 8689).
3.  **The text**, where the server says in words what code and status leave open ("450 ... Relay access denied",
    "550 ... greylisted, try again later").
4.  **The enhanced status**, where it names a kind of trouble; then the **code**, and the **stage** always
    (452 to RCPT is not 452 to MAIL).
5.  **A contradiction** of code and status means that one of them says "final": that one is believed, unless the words
    say "later". (4xx with 5.x.x: the status is the more exact. 5xx with 4.x.x: RFC 5321 §4.2.1, the first digit rules.)
6.  **Anything else**: 4xx is tried again, 5xx is final.

All patterns are linear-time: no repetition within a repetition, each gap bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum

from .reply import CODES, NO_REPLY, READ, Reply, Stage


class Action(Enum):
    """What to do about a reply."""

    RETRY = "RETRY"  # wait, then offer it again
    RECONNECT = "RECONNECT"  # close this connection; on a new one, offer it again
    AUTHENTICATE = "AUTHENTICATE"  # log in, then the envelope again, at once
    STARTTLS = "STARTTLS"  # encrypt, then the envelope again, at once
    REFRESH_TOKEN = "REFRESH_TOKEN"  # noqa: S105 - no password; ask for another token, log in with it
    SPLIT = "SPLIT"  # send to those taken so far; the rest in the next transaction, at once
    FAIL = "FAIL"  # final

    def __repr__(self) -> str:
        """As it is written in a rule."""
        return f"Action.{self.name}"


class Scope(Enum):
    """Whom a reply concerns."""

    RECIPIENT = "RECIPIENT"
    MESSAGE = "MESSAGE"
    SERVER = "SERVER"

    def __repr__(self) -> str:
        """As it is written in a rule."""
        return f"Scope.{self.name}"


_LAST_RESORTS = (Action.RETRY, Action.RECONNECT, Action.FAIL)
_STATUS = re.compile(r"(?:[245]|x)\.(?:\d{1,3}|\*|x)\.(?:\d{1,3}|\*|x)", re.ASCII)


@dataclass(frozen=True, kw_only=True, repr=False)
class Rule:
    """One row: the replies that it matches, and what they mean. What is left out matches everything.

    Args:
        action: what to do.
        code: the reply code: one, a range such as ``range(400, 500)``, or a tuple of codes; `NO_REPLY` for silence.
        enhanced: a status such as "4.2.2", "x.7.26" (x: any class) or "4.7.*", or a tuple of such.
        text: a regular expression, searched in the first 1000 characters of the text whatever the case of the letters;
            the line feeds of a multi-line reply count as spaces.
        unless: a regular expression that must not be found there ("too many recipients", unless "this hour").
        stages: when it was said, any iterable of `Stage`.
        token: True for sessions that log in with an OAuth token only.
        login: True for sessions that could log in and have not done so only: what is final for all others.
        fewer: True where the server has too many connections of this client: while others are open, their number stays
            below that for the time of the wait, and nothing else waits.
        scope: whom it concerns; None for the stage's own (RCPT: the recipient; CONNECT, EHLO, STARTTLS, AUTH: the
            server; else the message).
        wait: seconds that such trouble lasts at least, 0 where there is nothing to wait for; None for the backoff of
            the policy.
        otherwise: what to do where the session cannot do `action`: RETRY, RECONNECT or FAIL; None for FAIL for a 5xx,
            RETRY else.
        why: the reason, one sentence for a ticket.
        source: who says so: the RFC and section, or the page of the provider.

    Raises:
        ValueError: a code outside 200 to 599, a status or a regular expression that cannot be read, a wait below zero
            or not finite, or a rule that can match nothing: an empty range, tuple or collection of stages, a status
            where there is no reply.
        TypeError: a value of another type.
    """

    action: Action
    code: int | range | tuple[int, ...] | None = None
    enhanced: str | tuple[str, ...] | None = None
    text: str | None = None
    unless: str | None = None
    stages: Iterable[Stage] | None = None
    token: bool = False
    login: bool = False
    fewer: bool = False
    scope: Scope | None = None
    wait: float | None = None
    otherwise: Action | None = None
    why: str = ""
    source: str = ""
    _status: re.Pattern[str] | None = field(init=False, compare=False, default=None)
    _text: re.Pattern[str] | None = field(init=False, compare=False, default=None)
    _unless: re.Pattern[str] | None = field(init=False, compare=False, default=None)

    def __post_init__(self) -> None:
        """Refuse at once what can never be meant."""
        _check(self.action, Action, "action")
        _check(self.otherwise, Action, "otherwise", optional=True)
        _check(self.scope, Scope, "scope", optional=True)
        _check(self.token, bool, "token")
        _check(self.login, bool, "login")
        _check(self.fewer, bool, "fewer")
        _check(self.why, str, "why")
        _check(self.source, str, "source")
        if self.otherwise is not None and self.otherwise not in _LAST_RESORTS:
            msg = f"otherwise is what every session can do, RETRY, RECONNECT or FAIL, not {self.otherwise.name}"
            raise ValueError(msg)
        self._check_code()
        self._check_wait()
        if self.stages is not None:
            object.__setattr__(self, "stages", _stages(self.stages))
        if self.enhanced is not None:
            object.__setattr__(self, "_status", _status(self.enhanced))
            if self.code == NO_REPLY:
                msg = "a rule for NO_REPLY with an enhanced status can match nothing: silence has no status"
                raise ValueError(msg)
        for name in ("text", "unless"):
            if (pattern := getattr(self, name)) is not None:
                object.__setattr__(self, f"_{name}", _pattern(pattern, name))
        if self.text is not None and self.text == self.unless:
            msg = f"a rule for a text unless that same text can match nothing: {self.text!r}"
            raise ValueError(msg)

    def _check_code(self) -> None:
        codes = (self.code,) if isinstance(self.code, int) else self.code
        if codes is None:
            return
        if not isinstance(codes, (range, tuple)) or not all(type(code) is int for code in codes):
            msg = f"code is a number, a range or a tuple of numbers, not {self.code!r}"
            raise TypeError(msg)
        if not codes:
            msg = f"a rule with no code can match nothing: {self.code!r} is empty"
            raise ValueError(msg)
        if wrong := [code for code in codes if code not in CODES and code != NO_REPLY]:
            msg = f"a reply code is from 200 to 599, or NO_REPLY (-1), not {wrong[0]}"
            raise ValueError(msg)

    def _check_wait(self) -> None:
        if self.wait is None:
            return
        if isinstance(self.wait, bool) or not isinstance(self.wait, (int, float)):
            msg = f"wait is a number of seconds or None, not {self.wait!r}"
            raise TypeError(msg)
        if not 0 <= self.wait < math.inf:
            msg = f"wait is a finite number of seconds, 0 or more, not {self.wait!r}"
            raise ValueError(msg)

    def matches(self, reply: Reply, stage: Stage, *, token: bool = False, login: bool = False) -> bool:
        """Whether this row is about that reply, said at that stage, in such a session."""
        if (self.token and not token) or (self.login and not login):
            return False
        if self.stages is not None and stage not in self.stages:
            return False
        if self.code is not None and reply.code not in ((self.code,) if isinstance(self.code, int) else self.code):
            return False
        if self._status is not None and not (reply.enhanced and self._status.fullmatch(reply.enhanced)):
            return False
        text = reply.text[:READ].replace("\n", " ")
        if self._text is not None and not self._text.search(text):
            return False
        return self._unless is None or not self._unless.search(text)

    def __repr__(self) -> str:
        """As it is written, without what is left out."""
        return f"Rule({', '.join(f'{name}={value}' for name, value in self._given())})"

    def _given(self) -> Iterator[tuple[str, str]]:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.init and value != each.default:
                if each.name == "stages":
                    value = "{" + ", ".join(f"Stage.{stage.name}" for stage in Stage if stage in value) + "}"
                yield each.name, value if each.name == "stages" else repr(value)


def _check(value: object, kind: type, name: str, *, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        msg = f"{name} is a {kind.__name__}{' or None' * optional}, not {value!r}"
        raise TypeError(msg)


def _stages(stages: Iterable[Stage]) -> frozenset[Stage]:
    if not isinstance(stages, Iterable):
        msg = f"stages is a collection of Stage, such as {{Stage.MAIL, Stage.RCPT}}, not {stages!r}"
        raise TypeError(msg)
    stages = frozenset(stages)
    if wrong := [stage for stage in stages if not isinstance(stage, Stage)]:
        msg = f"stages is a collection of Stage, such as {{Stage.MAIL, Stage.RCPT}}, and holds {wrong[0]!r}"
        raise TypeError(msg)
    if not stages:
        msg = "a rule with no stage can match nothing; leave stages out for any stage"
        raise ValueError(msg)
    return stages


def _status(enhanced: str | tuple[str, ...]) -> re.Pattern[str]:
    each = (enhanced,) if isinstance(enhanced, str) else enhanced
    if not isinstance(each, tuple) or not all(isinstance(status, str) for status in each):
        msg = f'enhanced is a status such as "4.2.2", "x.7.26" or "4.7.*", or a tuple of such, not {enhanced!r}'
        raise TypeError(msg)
    if not each:
        msg = "a rule with no enhanced status can match nothing: the tuple is empty"
        raise ValueError(msg)
    for status in each:
        if not _STATUS.fullmatch(status):
            msg = f'an enhanced status is of class 2, 4, 5 or x, such as "4.2.2", "x.7.26" or "4.7.*", not {status!r}'
            raise ValueError(msg)
    return re.compile("|".join(s.replace(".", r"\.").replace("x", r"\d+").replace("*", r"\d+") for s in each))


def _pattern(text: str, name: str) -> re.Pattern[str]:
    _check(text, str, name)
    if not text:
        msg = f"{name} is empty and would be found in every reply; leave it out"
        raise ValueError(msg)
    try:
        return re.compile(text, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        msg = f"{name} is no regular expression: {error} in {text!r}"
        raise ValueError(msg) from error


# --- The words of the table -------------------------------------------------------------------------------------------
#
# Each is a class of meaning, one way of putting it a line. Gaps and repetitions are bounded: linear time.


def _any(*phrases: str) -> str:
    return "|".join(phrases)


_4XX, _5XX, _REFUSALS = range(400, 500), range(500, 600), range(400, 600)
_TRANSACTION = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END_OF_DATA)
_FILLING = (Stage.RCPT, Stage.DATA, Stage.END_OF_DATA)

_REQUIRED = r"(?:requi\w{0,2}red|needed|mandatory|necessary|first)\b"
_MUST = r"\b(?:must|need to|have to|please|should|first)\b(?! not)"
_FORBIDDEN = r"(?:denied|not (?:permitted|allowed|authori[sz]ed)|prohibited|refused|is disabled)\b"
_CANNOT = (
    r"\b(?:unable|not (?:permitted|allowed|authori[sz]ed|configured)|can ?not|can't|won't|will not"
    r"|do(?:es)?(?: not|n't)|refus\w+)"
)
_TIMEOUT = r"\btime(?:d |-)?out\b"

_BAD_CERTIFICATE = _any(
    r"certificate[ _]verify[ _]failed",
    r"certificate .{0,40}(?:expired|mismatch|not valid|self.signed)",
)
_TLS = _any(
    _MUST
    + r".{0,20}\b(?:issue|use|send|start|enable|negotiate|connect|upgrade|be)\b"
    + r".{0,24}\b(?:start ?tls|tls|ssl|encrypt\w*)\b",
    r"\b(?:start ?tls|tls|ssl|encryption|secure connection)\b.{0,30}\b" + _REQUIRED,
    r"\b(?:requires?|only)\b.{0,30}\b(?:tls|ssl|encrypted|secure connection)\b",
    r"(?:\bnot|n't) (?:sent )?(?:over|via) an? (?:tls|ssl|encrypted)\b",
    r"\bdisallowed on (?:non-secure|unencrypted)",
)
_BAD_SMTP = _any(
    r"\b(?:protocol|syntax) (?:error|violation)",
    r"\bpipelin",
    r"\binvalid base64",
    r"\bbare (?:cr|lf|newline|line.?feed)",
    r"smtplf|barelf",  # the pages that qmail and Haraka name
)
_LIMIT = r"\b(?:limit\w*|quota|max\w*|exceed\w*|too m(?:any|uch))\b"
_THIS_SESSION = r"(?:(?:this|the|an?|one|each|single|same|your|smtp|tcp) ){0,3}(?:session|connection)\b"
_SESSION_LIMIT = _any(
    _LIMIT + r".{0,24}\b(?:messages?|e?mails?|msgs?|recipients?|rcpts?|transactions?|deliver\w+|quota)\b.{0,12}"
    r"\b(?:per|in|on|for|during|over|of) " + _THIS_SESSION,
    r"\bsession exceeded|\bsession limit",
    r"\b(?:session|connection) (?:message|mail|transaction|recipient)s? (?:limit|count)",
    r"\b(?:a new|a new smtp|another|another new) (?:session|connection)\b|(?<!not )\breconnect",
    r"\btoo many (?:messages|e?mails) sent\W{0,3}$",
)
_MESSAGES = r"(?:(?:concurrent|open|smtp|simultaneous|recent) )?(?:messages|e?mails?|connections?|sessions)\b"
_SOME = r"(?:(?!invalid|unknown|bad|fail|wrong|non)\w{1,20} )"
_TOO_MANY_RECIPIENTS = _any(
    rf"\btoo m(?:any|uch) {_SOME}{{0,2}}(?:recipients|rcpts?|addressees)\b",
    rf"\b(?:max\w*|more than|exceed\w*|number of) {_SOME}{{0,5}}(?:recipients|rcpts)\b",
    rf"\blimit\w* {_SOME}{{0,2}}\d+ recipients\b",
    r"\brecipients? (?:limit|count)\b",
    r"\brecipients\b(?! (?:is |are )?not).{0,20}\b(?:exceed\w*|reached|limit|allowed)\b",
    r"\bseparate transaction|\bmultiple (?:\w{1,20} )?domains\b",
    r"\b(?:one|single) (?:recipient|rcpt|domain)\b.{0,20}\b(?:at a time|per|only)\b",
)
_BAD_RECIPIENTS = r"\b(?:invalid|unknown|bad|wrong|failed|non-?existent) (?:recipients|users|rcpts)\b"
_WINDOW = _any(  # what says that a limit is one of time, and not of this session or transaction
    r"\b(?:hours?|hourly|daily|days?|minutes?|seconds?|weekly|monthly|today|24 ?h\w*|from|received|sent|recent\w*)\b",
    r"\b(?:throttl\w+|frequen\w+|quota|rate|too (?:fast|quickly|often))\b",
    r"\d ?/ ?\d{0,4} ?[smhd]\b",
)
_WITHIN = r".{0,80}\b(?:this|per|an?|each|every|one|last|past) ?"
_QUOTA = _any(
    r"\b(?:hour|hourly|daily|day)\b.{0,24}\b(?:limit|quota)\b|\bfor the day\b",
    r"\b(?:sending|submission|throttling|count) ?(?:limit|quota) ?(?:exceed|reached)",
    r"\b(?:exceed|reach)(?:s|ed|ing)?\b.{0,30}\b(?:sending|submission) (?:limit|quota)",
    _LIMIT + _WITHIN + r"(?:hour|day|24 ?h\w*)\b|" + _LIMIT + r".{0,40}\btoday\b",
)
_RATE = _any(
    r"\b(?:rate|frequency)[- ]?(?:is |was )?(?:limit|overlimit|exceed)|\bsending rate\b|\bat a rate that|\bthrottl",
    _LIMIT + _WITHIN + r"(?:minute|second)\b",
    r"\btoo m(?:any|uch) (?:new )?(?!spam|unwanted|junk)(?:\w{1,20} )?"
    r"(?:recipients|mail|messages|connections|commands|sessions|requests) from\b",
    r"\btoo (?:fast|quickly|often|frequent)|\bslow down\b",
    rf"\btoo m(?:any|uch) {_MESSAGES}(?! (?:containing|with))",
)
_MAILBOX = r"\b(?:mail ?box|inbox|over ?quota|storage)\b"
_FOR_NOW = _any(
    r"\btempor(?:ar|är)\w*\b(?! e?-?mail| address| domain)|\btransient\b|\bdeferred\b",
    r"\b(?:try|retry|resend|send|come|again|attempt\w*)\b.{0,24}\blater\b|\blater\b.{0,8}\btry",
    r"\b(?:try|retry) (?:again )?(?:in|after|soon|shortly)\b",
    r"\bplus tard\b|\bm[aá]s tarde\b|\bsp[aä]ter\b",
)
_GREYLIST = r"\bgr[ea]y[- ]?list"
_SENDER_AUTH = _any(
    r"\b(?:spf|dkim|dmarc)\b",
    r"\b(?:sender|e-?mail|message|mail) is (?:un|not )authenticated|\bunauthenticated (?:e-?mail|message)",
    r"\bauthentication (?:checks|information|level|results)\b",
    r"\bname lookup failed",
)
_LOG_IN = _any(
    r"\bauth\w{0,14} (?:is |was |command )?" + _REQUIRED,
    r"\brequires? (?:\w{1,20} )?(?:auth\w*|log-?in)\b",
    _MUST + r".{0,12}\b(?:log ?in|log on|authenticate|be authenticated|(?:issue|send|use|do) (?:an )?auth)\b",
    _MUST + r".{0,12}\b(?:enable|turn on|use) (?:smtp )?auth",
    r"\bnot logged[- ]in\b|\blog ?in first\b|\bunauthenticated senders?\b.{0,8}\bnot allowed",
    r"(?:^|\b(?:you are|client|client is|client was|user|connection|session|sender) )not (?:yet )?authenticated",
)
_RELAY = _any(
    r"\brelay(?:ing)?(?: \S{1,60}){0,3} " + _FORBIDDEN,
    _CANNOT + r"(?: to)? relay\b",
    r"\bno relay|\bnot a relay\b",
    r"\bcannot deliver mail for\b",  # Haraka, for whom it does not relay
    r"\bclient host rejected: access denied",  # Postfix, where a submission service checks the client first
)
_NO_NAME = _any(
    r"\bcannot find your (?:reverse )?host|\bname lookup failed",
    r"\bunverif[iy]+able (?:sending|host|ip)",
    r"\bhelo command rejected",
    r"\b(?:no|missing|invalid|without|bad)(?: valid)? (?:reverse.?dns|rdns|ptr|reverse host)",
    r"\b(?:reverse.?dns|rdns|ptr)\b.{0,30}\b(?:missing|required|not (?:found|exist|set|match)|mismatch)",
)
_NO_SUCH_USER = _any(
    r"\b(?:user|mailbox|recipient|account|address) (?:\w{1,20} )?"
    r"(?:unknown|not found|not known|does(?: not|n't) exist)\b",
    r"\b(?:no such|unknown|invalid|non-?existent) (?:local )?(?:user|mailbox|recipient|account|address)\b",
)
_UNSURE = _any(
    r"verif|check|look ?up|unable|could ?n[o']t|(?:temporary|internal|server) error|" + _TIMEOUT,
    r"try|retry|wait|too many|rate|quota|full|limit",
)
_MAILBOX_FULL = _any(
    r"\b(?:mail ?box|inbox|account|user|recipient|maildir)\b.{0,30}\b(?:full|quota|storage)\b",
    r"\bover ?quota|\bquota (?:exceeded|full)",
    r"\bexceeded storage allocation",
)
_TOO_BIG = _any(
    r"\btoo (?:big|large)\b|\bmessage size\b|\bsize limit\b|\btoo much (?:mail )?data\b",
    r"\bexceed\w*\b.{0,30}\b(?:size|length)\b",
)
_CROWD = _any(
    r"\b(?:concurrent|simultaneous|many|maximum|number of)\b.{0,30}\b(?:connections?|sessions?)\b|\btrop de connexions",
    r"\bsender thread limit",
)
_PER_TIME = r"\brate\b|\b(?:hour|day|minute|second)s?\b"
_BUSY = _any(
    r"\bshut(?:ting)? ?down|\b(?:high|system|server) load\b|\boverload|\bserver (?:is )?(?:too )?busy\b",
)
_STORAGE = _any(
    r"\b(?:insufficient|out of|not enough|unable to allocate)\b.{0,24}\b(?:disk|storage|space|memory|resources|buffer)",
    r"\bdisk\b.{0,12}\bfull|\bspace shortage|\b(?:mail )?system full",
)
_OUT_OF_SERVICE = r"\b(?:service|server|system)\b.{0,24}\b(?:unavailable|not (?:available|accepting)|refused)"
_BLOCKED = _any(
    r"\bblock(?:ed|list)|\bblack-?list|\b(?:rbl|dnsbl)\b|\blisted\b|\bbanned\b",
    r"spamhaus|spamcop|\breputation\b|\bpolicy restrictions",
)
_TOKEN = _any(
    r"\btoken\b.{0,30}\b(?:expired|invalid|revoked|not valid|rejected|refused)\b",
    r"\b(?:expired|invalid|revoked|bad|stale) (?:\w{1,20} ){0,2}token\b",
)

# fmt: off
DEFAULT_RULES: tuple[Rule, ...] = (
    # 1. Silence and hang-ups: about the connection, whatever else is said.
    Rule(code=NO_REPLY, text=_BAD_CERTIFICATE, action=Action.FAIL, scope=Scope.SERVER,
         why="The server's TLS certificate does not verify, and will not tomorrow: renew it, or trust its authority.",
         source="RFC 3207 §4.1"),
    Rule(code=NO_REPLY, action=Action.RECONNECT,
         why="The connection broke, timed out, or carried no SMTP reply: try again on a new one.",
         source="RFC 5321 §4.5.4.1"),
    Rule(code=421, text=_TLS, stages=_TRANSACTION, action=Action.STARTTLS, otherwise=Action.RECONNECT,
         why="The server hangs up because the connection is not encrypted: encrypt the next one.",
         source="Google: Gmail SMTP errors and codes (421 4.7.0 TLS required for RCPT domain; 4.7.29)"),
    Rule(code=421, text=_SESSION_LIMIT, action=Action.RECONNECT, wait=0,
         why="This connection has carried as much as the server allows: go on with a new one.",
         source="Exim specification: smtp_accept_max_per_connection"),
    Rule(code=421, text=_any(r"\bidle\b|\binactiv", _TIMEOUT), unless=r"deferred|upstream|proxy",
         action=Action.RECONNECT, wait=0,
         why="The server closed a connection on which nothing came in time: nothing is wrong with a new one.",
         source="RFC 5321 §4.5.3.2.7"),
    Rule(code=421, text=_CROWD, unless=_PER_TIME, action=Action.RECONNECT, scope=Scope.SERVER, fewer=True,
         why="The server has enough connections from here: go on with those that are open.",
         source="Postfix: smtpd_client_connection_count_limit; Exim specification: smtp_accept_max_per_host"),
    Rule(code=421,
         text=_any(_CROWD, _BUSY, _STORAGE, _OUT_OF_SERVICE, _QUOTA, _RATE, r"\btemporarily deferred|\bunusual rate"),
         action=Action.RECONNECT, scope=Scope.SERVER,
         why="The server is busy, full, going down, or has had too much from here: leave it alone for a while.",
         source="RFC 5321 §3.8; Google: Gmail SMTP errors and codes (4.7.0, 4.7.28); Yahoo: SMTP error codes (TSS04)"),
    Rule(code=421, action=Action.RECONNECT,
         why="The server closes this connection and may take the message on another one, later.",
         source="RFC 5321 §3.8, §4.2.2; Apple: Postmaster information for iCloud Mail (421 4.7.1 excessive volume)"),

    # 2. What can mean one thing only.
    Rule(code=(500, 501, 502, 504, 555), unless=_any(_TLS, _LOG_IN), action=Action.FAIL,
         why="The server does not know the command or its parameters, and will not the next time.",
         source="RFC 5321 §4.2.2"),
    Rule(code=_5XX, text=_BAD_SMTP, action=Action.FAIL,
         why="The server objects to how this client speaks SMTP.",
         source="RFC 2920 §3.1; RFC 3207 §4"),
    Rule(code=_REFUSALS, enhanced=("x.4.7", "x.7.30"), action=Action.FAIL,
         why="A relay gave up after its own retries, or cannot give the message the protection that it asks for.",
         source="RFC 3463 §3.5 (x.4.7); RFC 8689 (x.7.30)"),
    Rule(code=_5XX, enhanced=("x.2.3", "x.3.4"), action=Action.FAIL, scope=Scope.MESSAGE,
         why="The message is larger than the server or the mailbox takes.",
         source="RFC 3463 §3.3, §3.4; RFC 1870 §6.1"),
    Rule(code=_5XX, text=_TOO_BIG, action=Action.FAIL, scope=Scope.MESSAGE,
         why="The message is larger than the server or the mailbox takes.",
         source="RFC 1870 §6.1; RFC 5321 §4.5.3.1.9 (552 Too much mail data)"),
    Rule(code=_5XX, enhanced=tuple(f"x.7.{detail}" for detail in (20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 509, 515)),
         action=Action.FAIL,
         why="The sender's domain or host fails SPF, DKIM, DMARC or reverse DNS, or has sent spam: no log-in helps.",
         source="RFC 7372 §3; Google: Email sender guidelines; Microsoft: NDR codes (5.7.509, 5.7.515)"),
    Rule(code=_REFUSALS, enhanced=("x.7.10", "x.7.11"), action=Action.STARTTLS, otherwise=Action.FAIL,
         why="The server takes this over an encrypted connection only.",
         source="RFC 5248 §2.4 (x.7.10, x.7.11)"),
    Rule(code=(523, 524, 538), action=Action.STARTTLS, otherwise=Action.FAIL,
         why="The server takes this over an encrypted connection only.",
         source="RFC 5248 §2.4 (523, 524); RFC 4954 §6 (538)"),
    Rule(code=_REFUSALS, enhanced="x.7.57", stages=_TRANSACTION, action=Action.AUTHENTICATE, otherwise=Action.FAIL,
         scope=Scope.MESSAGE,
         why="Exchange takes mail from clients that are logged in only.",
         source="Microsoft: Fix issues with printers, scanners, and LOB applications (5.7.57)"),
    Rule(code=_4XX, enhanced="x.1.10", action=Action.FAIL,
         why="The domain says that it takes no mail at all (null MX).",
         source="RFC 7505 §4.1"),
    Rule(code=_4XX, enhanced="x.5.3", stages=[Stage.MAIL], unless=_WINDOW, action=Action.RECONNECT, wait=0,
         why="This session has carried as many messages as the server allows: go on with a new one.",
         source="OpenSMTPD: smtp_session.c (452 4.5.3 Too many messages sent)"),

    # 3. Words that say what code and status leave open.
    Rule(code=_REFUSALS, text=_GREYLIST, action=Action.RETRY,
         why="Greylisting: the server takes the message when it is offered again after some minutes.",
         source="RFC 6647 §5; postgrey; milter-greylist; rspamd: greylisting module"),
    Rule(code=_REFUSALS, text=_TOKEN, stages=[Stage.AUTH], action=Action.REFRESH_TOKEN, otherwise=Action.FAIL,
         why="The OAuth token has expired or is not valid: ask for another.",
         source="RFC 7628 §3.2.2; Google: XOAUTH2 protocol; Microsoft: Authenticate an SMTP connection using OAuth"),
    Rule(code=_REFUSALS, text=_TLS, unless=r"not available|unavailable|not supported",
         stages=(*_TRANSACTION, Stage.AUTH), action=Action.STARTTLS, otherwise=Action.FAIL,
         why="The server takes mail and passwords over an encrypted connection only.",
         source="RFC 3207 §4 (530 Must issue a STARTTLS command first)"),
    Rule(code=_5XX, text=_SENDER_AUTH, action=Action.FAIL,
         why="The message does not pass SPF, DKIM or DMARC, or its host has no name in the DNS: no log-in helps.",
         source="RFC 7372 §3; Google: Email sender guidelines; Yahoo: Sender best practices"),
    Rule(code=_5XX, text=r"\bRESOLVER\.RST\b|\bTenantAttribution\b", action=Action.FAIL,
         why="Exchange takes this mail from inside its own organisation, or through its own connector, only.",
         source="Microsoft: NDR codes (5.7.64, 5.7.133, 5.7.134)"),
    Rule(code=_REFUSALS, text=_LOG_IN, stages=_TRANSACTION, action=Action.AUTHENTICATE, otherwise=Action.FAIL,
         scope=Scope.MESSAGE,
         why="The server takes mail from clients that are logged in only.",
         source="RFC 4954 §6 (530)"),
    Rule(code=554, enhanced="5.7.1", text=r"\brejected: access denied", login=True, stages=_TRANSACTION,
         action=Action.AUTHENTICATE, otherwise=Action.FAIL,
         why="The server takes mail from clients that are logged in only, or refuses this address for good.",
         source="Postfix: master.cf, submission (permit_sasl_authenticated,reject)"),
    Rule(code=_REFUSALS, text=_RELAY, unless=_FOR_NOW, stages=_TRANSACTION,
         action=Action.AUTHENTICATE, otherwise=Action.FAIL,
         why="The server does not relay for strangers: log in, or ask the responsible server; waiting does not help.",
         source="RFC 5321 §7.9; Postfix: reject_unauth_destination (554), defer_unauth_destination (454, its default)"),
    Rule(code=_REFUSALS, text=_SESSION_LIMIT, unless=_any(r"concurrent|simultaneous", _BAD_RECIPIENTS),
         stages=_TRANSACTION, action=Action.RECONNECT, wait=0,
         why="This connection has carried as much as the server allows: go on with a new one.",
         source="OpenSMTPD: smtp_session.c; Microsoft: Mail flow rate limits; Yahoo: SMTP error codes"),
    Rule(code=_4XX, text=r"\btoo many (?:messages|e?mails)\b", unless=_WINDOW, stages=[Stage.MAIL],
         action=Action.RECONNECT, wait=0,
         why="This session has carried as many messages as the server allows: go on with a new one.",
         source="OpenSMTPD: smtp_session.c; Exim specification: smtp_accept_max_per_connection"),
    Rule(code=_REFUSALS, text=_TOO_MANY_RECIPIENTS, unless=_any(_WINDOW, _BAD_RECIPIENTS),
         stages=_FILLING, action=Action.SPLIT,
         why="The transaction is full: the recipients taken so far go now, the rest in the next one.",
         source="RFC 5321 §4.5.3.1.10 (452, and 552 read as 452); Mailgun: error codes (max is 1000)"),
    Rule(code=_REFUSALS, enhanced="x.5.3", unless=_any(_WINDOW, _BAD_RECIPIENTS, "messages"),
         stages=_FILLING, action=Action.SPLIT,
         why="The transaction is full: the recipients taken so far go now, the rest in the next one.",
         source="RFC 3463 §3.6 (x.5.3); RFC 5321 §4.5.3.1.10"),
    Rule(code=(452, 552), text=r"^\W*$", stages=[Stage.RCPT], action=Action.SPLIT,
         why="Said to a recipient without a word, it means that the transaction is full.",
         source="RFC 5321 §4.5.3.1.10"),
    Rule(code=_4XX, text=r"\bclosing (?:the |smtp )?(?:connection|transmission|channel)", action=Action.RECONNECT,
         why="The server closes this connection and may take the message on another one, later.",
         source="RFC 5321 §3.8; Google: Gmail SMTP errors and codes (451 4.4.2 Timeout - closing connection)"),
    Rule(code=450, enhanced="4.3.2", text=r"\bservice currently unavailable", action=Action.RECONNECT, wait=0,
         why="Postfix's postscreen has tested this client, and lets it in on its next connection.",
         source="Postfix: POSTSCREEN_README (after-220 tests)"),
    Rule(code=_5XX, enhanced="x.2.2", unless=r"submission", action=Action.FAIL,
         why="The mailbox is full, and the server does not want the message later either.",
         source="RFC 3463 §3.3; Google: Gmail SMTP errors and codes (552 5.2.2)"),
    Rule(code=_REFUSALS, text=r"\breceiving (?:e-?)?mail\b|\bto this recipient\b|\brecipient has exceeded",
         action=Action.RETRY, scope=Scope.RECIPIENT, wait=600,
         why="This recipient gets more mail than the server lets through: the limit passes.",
         source="Google: Gmail SMTP errors and codes (450 4.2.1, 550 5.2.1); Microsoft: NDR codes (5.2.121)"),
    Rule(code=_4XX, text=_CROWD, unless=_PER_TIME, action=Action.RETRY, scope=Scope.SERVER, fewer=True,
         why="The server has enough connections from here: go on with those that are open.",
         source="Microsoft: SMTP AUTH client submission limits (432 4.3.2, three connections); Amazon SES: 454"),
    Rule(code=_REFUSALS, text=_QUOTA, unless=_MAILBOX, action=Action.RETRY, scope=Scope.SERVER, wait=600,
         why="The quota of an hour or a day is used up: it fills again.",
         source="Amazon SES: Errors related to the sending quotas for your account (wait up to 10 minutes); "
                "Google: Gmail SMTP errors and codes (5.4.5); Microsoft: NDR codes (5.1.90)"),
    Rule(code=_REFUSALS, text=_RATE, unless=_any(_MAILBOX, r"\bunusual rate"), action=Action.RETRY, scope=Scope.SERVER,
         why="Too much at once, or within a minute: the limit passes soon.",
         source="Postfix: anvil_rate_time_unit (60 s); Amazon SES: 454 Throttling failure, Maximum sending rate"),
    Rule(code=_5XX, text=_FOR_NOW, unless=r"\bpermanently\b|\bwill not succeed|\bdo not\b",
         stages=(*_TRANSACTION, Stage.CONNECT, Stage.EHLO), action=Action.RETRY,
         why="The code says for ever and the words say for now: the words, written for this case, are believed.",
         source="RFC 3463 §2 (persistent transient failure); Orange: OFR/LPN codes"),
    Rule(code=_5XX, text=r"\btemporar|\bconnection lost to auth|\binternal (?:server )?error|\bbackend",
         stages=[Stage.AUTH], action=Action.RETRY,
         why="The server could not check the password: it did not find it wrong.",
         source="RFC 4954 §6 (454); Postfix with Dovecot says 535 here"),
    Rule(code=_4XX, text=_NO_SUCH_USER, unless=_any(_FOR_NOW, _UNSURE), action=Action.FAIL, scope=Scope.RECIPIENT,
         why="There is no such mailbox; a server that says so with a 4xx code says the same tomorrow.",
         source="RFC 3463 §3.2 (x.1.1); Postfix: unknown_local_recipient_reject_code"),
    Rule(code=_4XX, text=_NO_NAME, unless=_any(_FOR_NOW, _TIMEOUT, "error"), action=Action.FAIL,
         why="The server objects to the name or the reverse DNS of the sending host, which waiting does not repair.",
         source="RFC 7372 §3.3 (x.7.25); Postfix: reject_unknown_client_hostname"),
    Rule(code=_4XX, text=_BAD_SMTP, unless=_FOR_NOW, action=Action.FAIL,
         why="The server could not read what this client sent, and will not the next time.",
         source="RFC 5321 §2.3.8 (no bare line feeds), §4.2.2"),
    Rule(code=_4XX, text=r"\bnot (?:authori[sz]ed|permitted|allowed) to send (?:from|as|on behalf)\b",
         action=Action.FAIL, scope=Scope.MESSAGE,
         why="This account may not send from that address.",
         source="SendGrid: SMTP errors and troubleshooting (403)"),

    # 4. A status or a code that names a kind of trouble; a contradiction of the two.
    Rule(code=_4XX, enhanced="x.2.2", action=Action.RETRY, wait=900,
         why="The mailbox is full until its owner clears it.",
         source="RFC 3463 §3.3; Exim specification: retry configuration (every 15 minutes for two hours)"),
    Rule(code=_4XX, text=_MAILBOX_FULL, action=Action.RETRY, wait=900,
         why="The mailbox is full until its owner clears it.",
         source="Exim specification: retry configuration (every 15 minutes for two hours)"),
    Rule(code=_4XX, enhanced="5.x.x", unless=_FOR_NOW, action=Action.FAIL,
         why="Code and status contradict each other; the status, the more exact of the two, says that this is final.",
         source="RFC 3463 §2"),
    Rule(code=_5XX, enhanced="4.x.x", action=Action.FAIL,
         why="Code and status contradict each other; a client goes by the first digit of the code.",
         source="RFC 5321 §4.2.1"),
    Rule(code=_4XX, stages=[Stage.AUTH], action=Action.RETRY,
         why="The server cannot check the password now; it did not find it wrong.",
         source="RFC 4954 §6 (454, 432); Exim specification: SMTP authentication (435)"),
    Rule(code=535, token=True, stages=[Stage.AUTH], action=Action.REFRESH_TOKEN, otherwise=Action.FAIL,
         why="The server refuses the token: ask for another.",
         source="RFC 4954 §6 (535); Google: XOAUTH2 protocol"),
    Rule(code=(534, 535), stages=[Stage.AUTH], action=Action.FAIL,
         why="The server refuses the user name or the password, or wants another way to log in.",
         source="RFC 4954 §6; Google: Gmail SMTP errors and codes (5.7.8, 5.7.9); Microsoft: NDR codes (5.7.139)"),
    Rule(code=530, unless=r"\b(?:name|address|domain|recipient)\b.{0,16}\b(?:not valid|invalid)|\bspam\b|\bblocked\b",
         action=Action.AUTHENTICATE, otherwise=Action.FAIL, scope=Scope.MESSAGE,
         why="The server takes mail from clients that are logged in only.",
         source="RFC 4954 §6 (530)"),
    Rule(code=_4XX, enhanced=("x.4.3", "x.1.8", "x.1.2"), action=Action.RETRY, wait=300,
         why="The server cannot find a domain in the DNS now.",
         source="RFC 3463 §3.5; Postfix: minimal_backoff_time (300 s)"),
    Rule(code=_4XX, enhanced="x.3.1", action=Action.RETRY, scope=Scope.SERVER, wait=300,
         why="The server's disk or memory is full, which takes a while to clear.",
         source="RFC 3463 §3.4; Postfix: minimal_backoff_time (300 s)"),
    Rule(code=_4XX, text=_STORAGE, action=Action.RETRY, scope=Scope.SERVER, wait=300,
         why="The server's disk or memory is full, which takes a while to clear.",
         source="RFC 5321 §4.2.2 (452); Postfix: minimal_backoff_time (300 s)"),
    Rule(code=_4XX, enhanced=("x.3.2", "x.4.5"), action=Action.RETRY, scope=Scope.SERVER,
         why="The server is overloaded, or takes no messages now.",
         source="RFC 3463 §3.4, §3.5; Microsoft: SMTP submission limits (432 4.3.2)"),
    Rule(code=_4XX, text=_BUSY, action=Action.RETRY, scope=Scope.SERVER,
         why="The server is overloaded, or takes no messages now.",
         source="RFC 5321 §3.8, §4.2.2"),
    Rule(code=_5XX, enhanced=("x.1.7", "x.1.8"), action=Action.FAIL, scope=Scope.MESSAGE,
         why="The sender's address is wrong, or its domain does not exist.",
         source="RFC 3463 §3.2"),
    Rule(code=_5XX, enhanced=("x.1.x", "x.2.x"), action=Action.FAIL,
         why="There is no such mailbox or domain, or the mailbox takes no mail.",
         source="RFC 3463 §3.2, §3.3; RFC 7505 §4.1 (x.1.10); Postmark and SendGrid: bounce types"),
    Rule(code=_5XX, text=_NO_SUCH_USER, action=Action.FAIL,
         why="There is no such mailbox.",
         source="RFC 5321 §4.2.2 (550)"),
    Rule(code=_5XX, text=_BLOCKED, action=Action.FAIL,
         why="The sending host or domain is on a block list, or the message looks like spam: ask who keeps the list.",
         source="Spamhaus: Blocklist removal centre; GMX and WEB.DE: postmaster error codes; OVH: email error codes"),
    Rule(code=_5XX, enhanced="x.6.x", action=Action.FAIL, scope=Scope.MESSAGE,
         why="The server does not take this content.",
         source="RFC 3463 §3.7"),
    Rule(code=_5XX, enhanced="x.7.x", action=Action.FAIL,
         why="The server's policy forbids it.",
         source="RFC 3463 §3.8; Apple: Postmaster information for iCloud Mail (5.7.1 [CS01] local policy)"),
    Rule(code=503, action=Action.FAIL,
         why="The command came at the wrong moment: the server and this client do not agree on where they are.",
         source="RFC 5321 §4.1.4, §4.2.2"),
)
# fmt: on


def markdown_table(rules: Iterable[Rule] = DEFAULT_RULES) -> str:
    """The table for a README: one row for each rule, in their order, with its reason and source."""
    rows = [
        "| reply | at | action | whom | wait | why | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in rules:
        cells = (*described(rule).values(), rule.why, rule.source)
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def described(rule: Rule) -> dict[str, str]:
    """A row in words a person reads: the replies, the stages, the action, the scope and the wait."""
    codes = "any code" if rule.code is None else _codes(rule.code)
    status = (rule.enhanced,) if isinstance(rule.enhanced, str) else rule.enhanced or ()
    reply = " ".join(filter(None, (codes, ", ".join(status), "by its words" * (rule.text is not None))))
    action = rule.action.name + (f", else {rule.otherwise.name}" if rule.otherwise else "")
    if rule.action in (Action.RETRY, Action.RECONNECT):
        wait = "the backoff" if rule.wait is None else "none" if rule.wait == 0 else f"{rule.wait:g} s"
    else:
        wait = ""
    return {
        "reply": reply + " (token sessions)" * rule.token + " (not logged in yet)" * rule.login,
        "at": "any stage" if rule.stages is None else ", ".join(stage.name for stage in Stage if stage in rule.stages),
        "action": action,
        "whom": ("by stage" if rule.scope is None else rule.scope.name) + ", or one connection" * rule.fewer,
        "wait": wait,
    }


def _codes(code: int | range | tuple[int, ...]) -> str:
    if isinstance(code, range) and code.step == 1 and code.start % 100 == 0 == code.stop % 100:
        return ", ".join(f"{hundred}xx" for hundred in range(code.start // 100, code.stop // 100))
    codes = (code,) if isinstance(code, int) else code
    return ", ".join("no reply" if each == NO_REPLY else str(each) for each in codes)
