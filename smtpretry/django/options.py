"""The options of the backend: their names, and what is wrong with those that are given."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, NoReturn

from django.conf import settings

from smtpretry.client import RetryingSMTP
from smtpretry.observer import hooks_of

if TYPE_CHECKING:
    from collections.abc import Iterable

OF_THE_CLIENT: Final = inspect.signature(RetryingSMTP).parameters.keys() - {"client", "username", "password", "defer"}
"""The options that `RetryingSMTP` takes."""

TAKEN: Final = OF_THE_CLIENT | {"queue"}
"""All of this library's own."""


def given() -> dict[str, Any]:
    """The setting ``SMTPRETRY``.

    Raises:
        TypeError: it is no dictionary.
    """
    own = getattr(settings, "SMTPRETRY", {})
    if not isinstance(own, Mapping):
        msg = f'SMTPRETRY is a dictionary of options, such as {{"queue": BASE_DIR / "mail.db"}}, not {own!r}'
        raise TypeError(msg)
    return dict(own)


def instead_of(name: str, taken: Iterable[str] = TAKEN) -> str:
    """What to write in place of a name that is no option's."""
    names = sorted(taken)
    close = get_close_matches(name, names, 1)
    return f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}"


def fault(name: str, value: Any) -> str | None:  # noqa: ANN401 - what a setting may hold
    """What is wrong with the value of an option; None where nothing is. It connects to nothing."""
    try:
        if name == "queue":
            check_queue(value)
        elif name == "on_step":
            hooks_of(value)  # a client would show its stats to them
        else:
            RetryingSMTP(_no_client, **{name: value, "username": "x" if name == "oauth_token_generator" else None})
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def check_queue(queue: object) -> None:
    """Refuse what is no file.

    Raises:
        TypeError: it is of another type.
    """
    if queue is not None and not isinstance(queue, (str, os.PathLike)):
        msg = f'queue is the name of a file, such as BASE_DIR / "mail.db", not {queue!r}'
        raise TypeError(msg)


def _no_client() -> NoReturn:
    """Never called: nothing is sent."""
    raise NotImplementedError
