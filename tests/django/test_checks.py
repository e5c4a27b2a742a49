"""`manage.py check` in a project: what is wrong with the backend's options is told before the first mail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.core.checks import run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.test.utils import override_settings

from smtpretry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from smtpretry.stats import Stats

RIGHT = {"queue": "mail.db", "policy": RetryPolicy.queue(), "max_connections": 4, "on_step": print, "pace": None}


class Watching:
    """A hook that asks for the client's stats."""

    def __init__(self) -> None:
        self.watched: list[Callable[[], Stats]] = []

    def __call__(self, *_: object) -> None:
        """Take a step."""

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Keep it."""
        self.watched.append(stats)


def told(setting: object) -> list[tuple[str | None, str, str | None]]:
    """What the check says of a setting."""
    with override_settings(SMTPRETRY=setting):
        return [(one.id, one.msg, one.hint) for one in run_checks() if str(one.id).startswith("smtpretry")]


@pytest.mark.parametrize("setting", [{}, RIGHT, {"oauth_token_generator": lambda: None}])
def test_what_is_right_is_no_issue(setting: dict[str, Any]) -> None:
    """Every option of the backend may be there."""
    assert told(setting) == []


@pytest.mark.parametrize(
    ("setting", "code", "said", "hint"),
    [
        ({"queu": "mail.db"}, "E002", "SMTPRETRY has queu, which EmailBackend does not take.", "Did you mean queue?"),
        ({"frobnicate": 1}, "E002", "has frobnicate, which", "pipelining, policy, queue"),
        ({"policy": "queue"}, "E003", "SMTPRETRY has a wrong policy.", "such as RetryPolicy() or"),
        ({"max_connections": 0}, "E003", "wrong max_connections", "a whole number from 1 on, not 0"),
        ({"queue": 5}, "E003", "wrong queue", 'BASE_DIR / "mail.db", not 5'),
        ({"on_step": 5}, "E003", "wrong on_step", "a function of a delivery"),
        ("mail.db", "E001", "SMTPRETRY is no dictionary", "not 'mail.db'"),
    ],
)
def test_what_is_wrong_is_an_error_with_a_hint(setting: Any, code: str, said: str, hint: str) -> None:
    """A name that nobody takes, and a value of another kind."""
    [(number, message, advice)] = told(setting)
    assert number == f"smtpretry.{code}"
    assert said in message
    assert hint in str(advice)


def test_each_is_told_and_the_command_fails() -> None:
    """Two of them are two errors."""
    with (
        override_settings(SMTPRETRY={"queu": "mail.db", "polcy": 1}),
        pytest.raises(SystemCheckError, match=r"(?s)Did you mean policy.*Did you mean queue"),
    ):
        call_command("check")


def test_the_check_is_no_client_of_a_hook() -> None:
    """Metrics show the clients that send, not one that was made to look at an option."""
    hook = Watching()
    assert told({"on_step": hook}) == []
    assert hook.watched == []
