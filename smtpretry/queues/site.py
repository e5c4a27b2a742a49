"""A server, as a client knows it and as the workers on one queue tell each other of it: its pause and its pace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from smtpretry.replies.reply import Said

from .engine import Pause

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smtpretry.policy import RetryPolicy
    from smtpretry.session.pool import Pool

    from .engine import Paced


class Site:
    """The server that a pool's connections go to."""

    def __init__(self, pool: Pool, policy: RetryPolicy) -> None:
        self._pool, self._policy = pool, policy

    @property
    def server(self) -> str:
        """Its name, such as "smtp.example.com:587"."""
        return self._pool.server

    @property
    def pause(self) -> Pause:
        """Until when nothing is tried, because the server said so."""
        said = self._pool.reason if self._pool.failures else None
        if said is None:
            return Pause()
        return Pause(self._pool.resumes_at, self._pool.failures, said.stage, said.reply)

    def adopt(self, pause: Pause) -> None:
        """Keep the pause that another client of the same server was asked for, or has seen the end of."""
        said = Said(pause.stage, pause.reply) if pause.stage and pause.reply else None
        self._pool.adopt(pause.until, pause.failures, said)

    def exempt(self) -> Callable[[Pause], bool]:
        """What tells whether a pause is none for it: others found too many connections, and it has some of them."""
        is_connected, decide = self._pool.is_connected, self._policy.decide

        def is_for_others(pause: Pause) -> bool:
            return bool(is_connected and pause.stage and pause.reply and decide(pause.reply, pause.stage).rule.fewer)

        return is_for_others

    def tell_pace(self) -> Paced | None:
        """What makes of the stored pace one that knows what this client has found out; None: that is nothing new."""
        return self._pool.news()

    @property
    def without_turn(self) -> int:
        """How many deliveries wait for a turn in the pace that is stored."""
        return self._pool.without_turn

    def follow(self, pace: str | None, turns: Sequence[float]) -> None:
        """Keep the pace that is stored, with these turns in it."""
        self._pool.follow(pace, turns)


@runtime_checkable
class HasSites(Protocol):
    """A client whose servers' pauses and paces the workers on one queue share."""

    @property
    def sites(self) -> Sequence[Site]:
        """Its servers, the preferred one first."""
