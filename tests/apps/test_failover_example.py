"""The example with two servers: which server said what."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import failover

if TYPE_CHECKING:
    import pytest


def test_it_prints_which_server_said_what(capsys: pytest.CaptureFixture[str]) -> None:
    """What is pending goes to the second server, who is greylisted stays, and the first one is used again."""
    asyncio.run(failover.main())
    stories, who = dict[str, list[str]](), ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            stories[who].append(line)
        else:
            who = line.partition("@")[0]
            stories[who] = []
    ends = {who: lines[-1].split()[2] for who, lines in stories.items() if lines}
    assert ends == {"ann": "first", "cat": "second", "dan": "second", "bob": "first", "eve": "first"}
    assert "421" in stories["cat"][-2]
    assert "450" in stories["bob"][0]
    assert "The first server has 3 messages, the second one has 2." in stories
