"""Whether commands may be sent ahead of the answers (RFC 2920): learned once for all connections of a client."""

from __future__ import annotations

_ENOUGH = 3  # transactions in a row that lost step, after which no more is sent ahead


class Pipelining:
    """Allowed, until a transaction that was sent ahead is not answered as it should be; again after one that goes well.

    A line that breaks is no reason to give it up, a server or a proxy that cannot do it is: after some in a row.
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
