"""When a server says something, and whom it concerns: `Stage` and `Scope`."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Scope(Enum):
    """Whom a reply concerns."""

    RECIPIENT = "RECIPIENT"
    MESSAGE = "MESSAGE"
    SERVER = "SERVER"

    def __repr__(self) -> str:
        """As it is written in a rule."""
        return f"Scope.{self.name}"


class Stage(Enum):
    """When the server said it: the step of the session or of the transaction (RFC 5321 §3.1-3.3, 3207, 4954)."""

    CONNECT = "CONNECT"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    END_OF_DATA = "END_OF_DATA"

    __hash__ = object.__hash__  # Enum's own is written in Python, and each reply would ask for it

    @property
    def scope(self) -> Scope:
        """Whom a reply at this stage concerns, where nothing in it says otherwise."""
        return _SCOPES[self]

    @property
    def before_mail(self) -> bool:
        """Whether no transaction has begun yet."""
        return self in _BEFORE_MAIL

    @property
    def before_recipients(self) -> bool:
        """Whether no recipient has been named yet."""
        return self is Stage.MAIL or self.before_mail

    @property
    def in_transaction(self) -> bool:
        """Whether a refusal here leaves a transaction open."""
        return self in _IN_TRANSACTION


_BEFORE_MAIL: Final = (Stage.CONNECT, Stage.EHLO, Stage.STARTTLS, Stage.AUTH)
_IN_TRANSACTION: Final = (Stage.RCPT, Stage.DATA)
_SCOPES: Final = {
    **dict.fromkeys(_BEFORE_MAIL, Scope.SERVER),
    Stage.MAIL: Scope.MESSAGE,
    Stage.RCPT: Scope.RECIPIENT,
    Stage.DATA: Scope.MESSAGE,
    Stage.END_OF_DATA: Scope.MESSAGE,
}
