"""The figures of the README's section on reliability: ``python -m tests.reliability`` prints them, in some seven minutes.

The whole matrix of `faults.py`, tried with smtpretry in both of its modes, and with what is commonly written instead:
tenacity around `aiosmtplib.send`. A mail is one message for one recipient; each cell has three.
"""

# ruff: noqa: T201 - it prints

from __future__ import annotations

import collections
import concurrent.futures
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import aiosmtplib
import faults
import tenacity
import virtual

ROWS = ('smtpretry, on_uncertain="resend"', 'smtpretry, on_uncertain="raise"', "tenacity around aiosmtplib.send")
COLUMNS = {
    "cells": "cells: a place, a fault, once or for ever, a new client or a used one",
    "faults": "faults injected",
    "mails": "mails: three recipients a cell",
    "lost": "lost in silence: reported as delivered, and not there",
    "twice": "arrived twice, although the server had said 250 to the first",
    "twice, uncertain": "arrived twice, where the answer to the first was lost (RFC 5321 asks for it)",
    "denied": "reported as failed, and arrived",
    "given up": "not delivered, although the server would have taken it, then or later",
    "no end": "neither delivered, refused nor reported uncertain",
}


def retrying(**settings: Any) -> tenacity.AsyncRetrying:
    """Return what many applications put around a send: every SMTP error is tried again, five times in all."""
    usual = {
        "retry": tenacity.retry_if_exception_type(aiosmtplib.SMTPException),
        "wait": tenacity.wait_exponential(multiplier=60, max=900),
        "stop": tenacity.stop_after_attempt(5),
        "reraise": True,
    }
    return tenacity.AsyncRetrying(**(usual | settings))


async def recipe(cell: faults.Cell) -> faults.Run:
    """Run a cell as many applications do it."""
    seen = faults.Run(cell)
    place = cell.place
    message = faults.SMALL if not place.large else faults.HUGE if place.verb == "BODY" else faults.LARGE
    async with faults.server_for(place) as server:
        if message is faults.HUGE:
            faults.take_little(server)
        script = faults.install(cell, server)
        errors: dict[str, object] | None = None
        try:
            refused, _ = await retrying()(
                aiosmtplib.send,
                message,
                sender=faults.SENDER,
                recipients=list(faults.RECIPIENTS),
                hostname=server.hostname,
                port=server.port,
                local_hostname="client.example",
                username="app" if server.credentials else None,
                password="secret" if server.credentials else None,
                tls_context=server.tls_context,
            )
            errors = dict(refused)
        except (aiosmtplib.SMTPException, OSError):
            errors = dict.fromkeys(faults.RECIPIENTS)
        seen.injected = script.used
        seen.copies = {who: faults.copies(server, who) for who in faults.RECIPIENTS}
        seen.reported = {who: "failed" if who in (errors or {}) else "accepted" for who in faults.RECIPIENTS}
        server.clear()
    return seen


def count(run: faults.Run) -> collections.Counter[str]:
    """Count what happened in a cell."""
    figures = collections.Counter(dict.fromkeys(COLUMNS, 0))
    honest = run.cell.dot_is_out
    figures.update(
        {
            "cells": 1,
            "faults": run.injected,
            "mails": len(run.copies),
            "lost": run.lost,
            "twice, uncertain" if honest else "twice": run.twice,
            "denied": run.wrong,
            "given up": run.given_up,
            "no end": sum(end == "pending" for end in run.reported.values()),
        }
    )
    return figures


def try_place(number: int) -> tuple[list[collections.Counter[str]], list[str]]:
    """Try every cell at a place, all three ways."""
    totals, problems = [collections.Counter[str]() for _ in ROWS], []
    for cell in faults.cells(faults.PLACES[number], all_of_them=True):
        run = virtual.run(faults.run(cell))
        totals[0 if cell.mode == "resend" else 1].update(count(run))
        problems += [str(run)] if run.problems else []
        if cell.mode == "resend":  # the recipe has no modes
            totals[2].update(count(virtual.run(recipe(cell))))
    return totals, problems


def main() -> int:
    """Print the figures; return 1 where a promise was broken."""
    began = time.monotonic()
    totals, problems = [collections.Counter[str]() for _ in ROWS], list[str]()
    with concurrent.futures.ProcessPoolExecutor(initializer=logging.disable) as workers:
        for done, found in workers.map(try_place, range(len(faults.PLACES))):
            for total, figures in zip(totals, done, strict=True):
                total.update(figures)
            problems += found
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row, total in zip(ROWS, totals, strict=True):
        print(f"| {row} | " + " | ".join(str(total[column]) for column in COLUMNS) + " |")
    print()
    for column, meaning in COLUMNS.items():
        print(meaning if meaning.startswith(column) else f"{column}: {meaning}")
    cells = totals[0]["cells"] + totals[1]["cells"]
    print(f"\n{len(faults.PLACES)} places, {len(faults.FAULTS)} faults, {cells} cells of smtpretry's own;", end=" ")
    print(f"{len(problems)} of them broke a promise. It took {time.monotonic() - began:.0f} s.")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
