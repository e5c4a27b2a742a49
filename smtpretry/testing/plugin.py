"""The fixtures that pytest finds by itself: `smtp_server` and `no_wait`. They import what they need when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .threaded import ThreadedServer
    from .waits import NoWait


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the marker."""
    config.addinivalue_line(
        "markers", "smtp_server(tls=..., auth=..., ...): what ScriptedServer is to be made with for `smtp_server`"
    )


_raised = pytest.StashKey[bool]()


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Keep whether the test, or a fixture, has raised: then no script that was not reached is news."""
    if call.when != "teardown":
        item.stash[_raised] = call.excinfo is not None


@pytest.fixture
def smtp_server(request: pytest.FixtureRequest) -> Iterator[ThreadedServer]:
    """A `smtpretry.testing.ScriptedServer` in a thread, for blocking and asynchronous tests.

    Its arguments come from markers, the nearest first: ``@pytest.mark.smtp_server(tls=True, auth=("app", "secret"))``.
    """
    from smtpretry.testing import ThreadedServer  # noqa: PLC0415 - where it is used

    options = dict[str, Any]()
    for marker in request.node.iter_markers("smtp_server"):
        if marker.args:
            msg = f"the marker smtp_server takes names, such as smtp_server(tls=True), not {marker.args[0]!r}"
            raise TypeError(msg)
        options = marker.kwargs | options
    with ThreadedServer(**options) as server:
        yield server
        if request.node.stash.get(_raised, False):
            server.clear()


@pytest.fixture
def no_wait() -> NoWait:
    """A `RetryPolicy` whose waits take no time; ``no_wait.waits`` are the seconds that it would have waited."""
    from smtpretry.testing import no_wait  # noqa: PLC0415 - where it is used

    return no_wait()
