"""What pytest says of itself, which smtpretry it tests, and how many tests run at a time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import smtpretry


def pytest_report_header() -> str:
    """Say where it is installed, for the source tree has another one."""
    return f"smtpretry: {smtpretry.__version__}, in {Path(smtpretry.__file__).parent}"


def pytest_xdist_auto_num_workers() -> int:
    """Two for each processor, for many tests wait for what other processes do."""
    return 2 * (os.cpu_count() or 1)


def pytest_configure() -> None:
    """Let Ctrl-C reach the programs that tests start: in the background of a shell it is ignored, and that is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
