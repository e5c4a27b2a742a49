"""Whether commands may be sent ahead of the answers (RFC 2920): learned once for all connections of a client."""

from __future__ import annotations

_ENOUGH = 3  # transactions in a row whose answers did not fit, after which no more is sent ahead


class Pipelining:
    """Allowed, until the answers to a transaction do not fit its commands. One that goes well allows it again.

    When several in a row have not fit, it is given up: the server, or a proxy before it, cannot do it.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._lost = 0 if wanted else _ENOUGH
        self._careful = False

    @property
    def allowed(self) -> bool:
        """Whether the next transaction may be sent ahead."""
        return self._lost < _ENOUGH and not self._careful

    @property
    def is_in_doubt(self) -> bool:
        """Whether it matters that the next transaction goes well."""
        return self._careful or 0 < self._lost < _ENOUGH

    def lose_step(self) -> None:
        """The answers did not fit: the next transaction is said one command at a time."""
        self._lost += 1
        self._careful = True

    def go_well(self, *, ahead: bool) -> None:
        """A transaction ended in good order."""
        self._lost = 0 if ahead else self._lost
        self._careful = False
