"""What the benchmarks share: tables and targets, letters, a fair race, a process of one's own, the machine's name."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

SENDER = "app@example.com"
LINE = "Sphinx of black quartz, judge my vow, and judge it once, not twice.\n"


@dataclass
class Table:
    """What one measurement gave.

    Attributes:
        title: what was asked.
        how: how it was measured, in a sentence or two.
        columns: their names.
        rows: one cell for each column: a text, a number, or None where there is none.
        targets: what was to be reached, and whether it was.
    """

    title: str
    how: str
    columns: Sequence[str]
    rows: list[Sequence[str | float | None]] = field(default_factory=list)
    targets: dict[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        """As Markdown that is also a table in a terminal."""
        cells = [list(self.columns), *([show(cell) for cell in row] for row in self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        numbers = [all(not isinstance(row[n], str) for row in self.rows) for n in range(len(self.columns))]
        lines = [
            " | ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in row)
            for row in (zip(line, widths, numbers, strict=True) for line in cells)
        ]
        rule = " | ".join("-" * (width - 1) + ("-:"[right]) for width, right in zip(widths, numbers, strict=True))
        table = [f"| {line} |" for line in (lines[0], rule, *lines[1:])] if self.rows else []
        ends = [f"* {'met' if met else 'MISSED'}: {target}" for target, met in self.targets.items()]
        parts = ([f"### {self.title}"], [self.how], table, ends)
        return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def show(cell: str | float | None) -> str:
    """Three digits of a number are enough."""
    if cell is None:
        return ""
    if isinstance(cell, float) and 0.001 <= abs(cell) < 100:
        return f"{cell:#.3g}"
    return cell if isinstance(cell, str) else f"{cell:,.0f}"


def letter(*recipients: str, size: int = 1024) -> EmailMessage:
    """A message whose bytes are `size`, more or less, with all the headers that a mail has."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = SENDER, ", ".join(recipients), "A word about your order"
    message["Message-ID"] = f"<{random.getrandbits(64):016x}@example.com>"
    message["Date"] = "Mon, 01 Jan 2024 00:00:00 +0000"
    rest = size - len(message.as_bytes()) - 110  # MIME's own headers
    message.set_content(LINE * max(1, round(rest / len(LINE))))
    return message


class Cost(NamedTuple):
    """Seconds for one call."""

    cpu: float
    wall: float


async def race(
    contenders: Mapping[str, Callable[[], Awaitable[object]]], *, rounds: int, block: int
) -> dict[str, list[Cost]]:
    """Let them take turns, `block` calls each, in another order each round; one round more, before, is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle  # noqa: S311
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            call = contenders[name]
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(block):
                await call()
            cost = Cost((time.process_time() - cpu) / block, (time.perf_counter() - wall) / block)
            if number:
                costs[name].append(cost)
    return costs


def ratio(mine: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The median of the ratios of each round, and its standard error."""
    ratios = sorted(one / other for one, other in zip(mine, others, strict=True))
    if len(ratios) < 4:
        return statistics.median(ratios), 0.0
    first, _, third = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), 0.93 * (third - first) / len(ratios) ** 0.5  # for a normal distribution


def in_a_process(work: Callable[..., Any], *args: Any) -> Any:
    """Call it in a process that has done nothing else, and return what it returns."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        msg = f"the process of {work.__name__}{args} has failed, as told above"
        raise RuntimeError(msg) from None
    finally:
        process.join()


def _report(pipe: Connection, work: Callable[..., Any], args: Sequence[Any]) -> None:
    pipe.send(work(*args))


def resident() -> int:
    """The bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str]:
    """Where it ran, and with what."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines()
        if line.startswith("model name")
    ]
    packages = ("smtpretry", "aiosmtplib", "tenacity", "stamina")
    return {
        "machine": f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }
