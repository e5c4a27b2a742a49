"""The quickstart of the README: what it prints, and what it draws."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import quickstart

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_quickstart_prints_and_draws_its_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each reply that decided something is a line of text and a line of the picture."""
    delivery = asyncio.run(quickstart.main())
    quickstart.draw(delivery, tmp_path / "timeline.svg")
    printed, drawn = capsys.readouterr().out, (tmp_path / "timeline.svg").read_text(encoding="utf-8")
    assert delivery.accepted == ["bob@example.com"]
    for words in ("450", "Greylisted", "530", "AUTHENTICATE", "235", "250"):
        assert words in printed
        assert words in drawn
    assert "seconds since the call" in drawn
