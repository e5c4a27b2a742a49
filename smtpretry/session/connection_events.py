"""Events of the connections of a client: which were opened and closed since they were last looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smtpretry.events import Closed, Opened

if TYPE_CHECKING:
    from smtpretry.observer import Observer

    from .connection import Connection


class ConnectionEvents:
    """Looks at connections, and notes for the hooks which were opened and closed meanwhile.

    Attributes:
        server: whom a connection was last made to.
        has_opened: whether there ever was a connection.
    """

    def __init__(self, observer: Observer) -> None:
        self.server = ""
        self.has_opened = False
        self._observer = observer
        self._seen: dict[Connection, tuple[int, bool]] = {}  # how many sessions it had, and whether one was open
        self._servers: dict[Connection, str] = {}

    def look_at(self, connection: Connection) -> str:
        """Note what has become of it since the last look; return the server at its other end."""
        before, now = self._seen.get(connection), (connection.sessions, connection.is_open)
        if before != now:
            self._seen[connection] = now
            self.server = self._servers[connection] = connection.server
            self._note(before or (0, False), now, tls=connection.is_tls)
        return self._servers[connection]

    def server_of(self, connection: Connection) -> str:
        """The server at the other end of an open connection."""
        return self._servers.get(connection) or self.look_at(connection)

    def _note(self, before: tuple[int, bool], now: tuple[int, bool], *, tls: bool) -> None:
        (sessions, was_open), (sessions_now, is_open) = before, now
        at, opened = self._observer.clock(), sessions_now > sessions or (is_open and not was_open)
        if was_open and (opened or not is_open):
            self._observer.note(None, Closed(at, self.server))
        if opened:
            self.has_opened = True
            self._observer.note(None, Opened(at, self.server, tls))
        if opened and not is_open:
            self._observer.note(None, Closed(at, self.server))
