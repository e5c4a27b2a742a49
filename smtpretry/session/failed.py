"""How a step of the session or of the transaction fails: `Failed`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smtpretry.replies.reply import NO_REPLY, Reply, Said

if TYPE_CHECKING:
    from smtpretry.replies.stage import Stage


class Failed(Exception):  # noqa: N818 - not an error of the caller's: it never leaves the package
    """A step of the session or of the transaction failed.

    Attributes:
        said: what came instead of a success.
        final: why nothing that the server may say later changes it, where that is known on this side.
    """

    def __init__(self, said: Said, final: str | None = None) -> None:
        super().__init__(said)
        self.said, self.final = said, final

    @classmethod
    def without_reply(
        cls, stage: Stage, error: Exception, *, final: bool = False, cure: str | None = None, hint: str = ""
    ) -> Failed:
        """No reply came; the error says what did, and a hint what to check. A cure makes it final, too."""
        why = "; ".join(filter(None, [getattr(error, "message", str(error)) or type(error).__name__, hint]))
        return cls(Said(stage, Reply.of(NO_REPLY, why), error), cure or (why if final else None))
