"""What pytest says of itself: which smtpretry it tests."""

from __future__ import annotations

from pathlib import Path

import smtpretry


def pytest_report_header() -> str:
    """Say where it is installed, for the source tree has another one."""
    return f"smtpretry: {smtpretry.__version__}, in {Path(smtpretry.__file__).parent}"
