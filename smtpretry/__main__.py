"""The command line: what smtpretry would do about a reply, and why; a message sent; a server for tests.

``python -m smtpretry explain '450 4.2.0 <bob@example.com>: Greylisted for 300 seconds' --stage rcpt``
``python -m smtpretry explain --json < /var/log/mail.log``
``python -m smtpretry rules``
``python -m smtpretry queue sqlite:mail.db list``
``python -m smtpretry send --host smtp.example.com < mail.eml``
``python -m smtpretry serve --on 'RCPT bob@* 450 4.2.0 later'``
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .cli import UNREADABLE, explain, queue, rules, send, serve, unheard

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED: Final = 130
"""The exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed from the beginning, as by `>&-`
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for as long as it runs
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError as error:  # whoever reads has seen enough
        unheard(error)
        return 1
    except OSError as error:  # a full disk
        unheard(error)
        return UNREADABLE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smtpretry", description="Explain SMTP replies, look into a queue, send a message, serve a test."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (explain, queue, rules, send, serve):
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
