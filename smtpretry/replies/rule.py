"""One row of the table: `Rule`, and the `Action` that it asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Final

from .patterns import caseless, compiled
from .reply import CODES, NO_REPLY, READ, Reply
from .stage import Scope, Stage


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


WAITING: Final = (Action.RETRY, Action.RECONNECT)
"""After these, what was refused is offered again later."""

_LAST_RESORTS = (*WAITING, Action.FAIL)
_STATUS = r"(?:[245]|x)\.(?:[0-9]{1,3}|\*|x)\.(?:[0-9]{1,3}|\*|x)"
_NAME = r"[a-z0-9]+(?:-[a-z0-9]+)*"


class Words(str):
    """A regular expression of this library's own, known to compile: it is compiled when it is first searched for."""

    __slots__ = ()


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
        token: True: only for sessions that log in with an OAuth token.
        login: True: only for sessions that could log in and have not done so.
        fewer: True: the server has too many connections of this client. As long as others are open, the client uses
            fewer of them for the time of the wait, and nothing else waits.
        slower: True: this client sends too fast. The client lowers its pace.
        scope: what the reply concerns; None: the server if the row is `slower`, else what the stage concerns (RCPT: the
            recipient; CONNECT, EHLO, STARTTLS, AUTH: the server; else the message).
        wait: seconds before the second attempt. It wins over the policy's `wait`, longer or shorter. With each further
            refusal it doubles, up to 15 minutes or the policy's `wait`, whichever is longer. 0: retry at once; None:
            the policy's `wait`. A delay that the server names wins over both.
        patience: seconds from the first attempt after which this kind of refusal is given up, if that is sooner than
            the policy's `give_up_after`; None for that one alone.
        otherwise: what to do if the session cannot do `action`: RETRY, RECONNECT or FAIL; None: FAIL for a 5xx, else
            RETRY.
        name: a short name in lower case, words joined by hyphens ("greylisted"): for metrics, logs and `explain`.
        why: the reason, one sentence for a ticket.
        cure: what a person can do if the refusal lasts, one sentence; for the note on the exception.
        source: who says so: the RFC and section, or the page of the provider.

    Raises:
        ValueError: a code outside 200 to 599, a status, a regular expression or a name that cannot be read, a wait
            below zero or a patience that is not above zero, either not finite, or a rule that can match nothing: an
            empty range, tuple or collection of stages, a status where there is no reply.
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
    slower: bool = False
    scope: Scope | None = None
    wait: float | None = None
    patience: float | None = None
    otherwise: Action | None = None
    name: str = ""
    why: str = ""
    cure: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse at once what can never be meant."""
        _check(self.action, Action, "action")
        _check(self.otherwise, Action, "otherwise", optional=True)
        _check(self.scope, Scope, "scope", optional=True)
        for name in ("token", "login", "fewer", "slower"):
            _check(getattr(self, name), bool, name)
        for name in ("name", "why", "cure", "source"):
            _check(getattr(self, name), str, name)
        if self.name and not compiled(_NAME).fullmatch(self.name):
            msg = f'name is words in lower case joined by hyphens, such as "greylisted", not {self.name!r}'
            raise ValueError(msg)
        if self.otherwise is not None and self.otherwise not in _LAST_RESORTS:
            msg = f"otherwise is what every session can do, RETRY, RECONNECT or FAIL, not {self.otherwise.name}"
            raise ValueError(msg)
        _check_seconds(self.wait, "wait")
        _check_seconds(self.patience, "patience", above=True)
        self._check_what_it_matches()

    def _check_what_it_matches(self) -> None:
        self._check_code()
        if self.stages is not None:
            object.__setattr__(self, "stages", _stages(self.stages))
        if self.enhanced is not None:
            _check_status(self.enhanced)
            if self.code == NO_REPLY:
                msg = "a rule for NO_REPLY with an enhanced status can match nothing: silence has no status"
                raise ValueError(msg)
        for name in ("text", "unless"):
            if (pattern := getattr(self, name)) is not None:
                _check_pattern(pattern, name)
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

    def matches(self, reply: Reply, stage: Stage, *, token: bool = False, login: bool = False) -> bool:
        """Whether this row is about that reply, said at that stage, in such a session."""
        if (self.token and not token) or (self.login and not login):
            return False
        if self.stages is not None and stage not in self.stages:
            return False
        if self.code is not None and reply.code not in ((self.code,) if isinstance(self.code, int) else self.code):
            return False
        if self.enhanced is not None and not self._has_status(reply.enhanced):
            return False
        text = reply.text[:READ].replace("\n", " ")
        if self.text is not None and not caseless(self.text).search(text):
            return False
        return self.unless is None or not caseless(self.unless).search(text)

    def _has_status(self, enhanced: str | None) -> bool:
        parts = (enhanced or "").split(".")
        return any(
            all(wanted in ("x", "*", part) for wanted, part in zip(status.split("."), parts, strict=False))
            for status in ((self.enhanced,) if isinstance(self.enhanced, str) else self.enhanced or ())
            if enhanced
        )

    def __repr__(self) -> str:
        """As it is written, without what is left out."""
        return f"Rule({', '.join(f'{name}={value}' for name, value in self._given())})"

    def _given(self) -> Iterator[tuple[str, str]]:
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default:
                if each.name == "stages":
                    value = "{" + ", ".join(f"Stage.{stage.name}" for stage in Stage if stage in value) + "}"
                yield each.name, value if each.name == "stages" else repr(value)


def _check(value: object, kind: type, name: str, *, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        such = f", such as {kind.__name__}.{next(iter(kind)).name}" if issubclass(kind, Enum) else ""
        msg = f"{name} is {article} {kind.__name__}{' or None' * optional}{such}, not {value!r}"
        raise TypeError(msg)


def _stages(stages: Iterable[Stage]) -> frozenset[Stage]:
    if isinstance(stages, str) or not isinstance(stages, Iterable):
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


def _check_seconds(value: float | None, name: str, *, above: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} is a number of seconds or None, not {value!r}"
        raise TypeError(msg)
    if not 0 <= value < math.inf or (above and value == 0):
        msg = f"{name} is a finite number of seconds, {'more than 0' if above else '0 or more'}, not {value!r}"
        raise ValueError(msg)


def _check_status(enhanced: str | tuple[str, ...]) -> None:
    each = (enhanced,) if isinstance(enhanced, str) else enhanced
    if not isinstance(each, tuple) or not all(isinstance(status, str) for status in each):
        msg = f'enhanced is a status such as "4.2.2", "x.7.26" or "4.7.*", or a tuple of such, not {enhanced!r}'
        raise TypeError(msg)
    if not each:
        msg = "a rule with no enhanced status can match nothing: the tuple is empty"
        raise ValueError(msg)
    for status in each:
        if not compiled(_STATUS).fullmatch(status):
            msg = f'an enhanced status is of class 2, 4, 5 or x, such as "4.2.2", "x.7.26" or "4.7.*", not {status!r}'
            raise ValueError(msg)


def _check_pattern(text: str, name: str) -> None:
    _check(text, str, name)
    if not text:
        msg = f"{name} is empty and would be found in every reply; leave it out"
        raise ValueError(msg)
    if isinstance(text, Words):
        return
    try:
        caseless(text)
    except (re.error, OverflowError, RecursionError) as error:
        msg = f"{name} is no regular expression: {error} in {text!r}"
        raise ValueError(msg) from error
