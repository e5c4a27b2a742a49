"""What an import costs: against ``import aiosmtplib``, which every user of smtpretry pays anyway."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

from .harness import Table, ratio

BARE, OURS = "import aiosmtplib", "import smtpretry"
FIRST = "from smtpretry import *; RetryPolicy().decide(Reply.parse('450 wait 5 minutes'), Stage.RCPT)"
CONTENDERS = {
    BARE: BARE,
    "import aiosmtplib, tenacity": "import aiosmtplib, tenacity",
    OURS: OURS,
    "import smtpretry, and judge a reply": FIRST,
}
ALLOWED = 1.6  # of the bare import
WITH_BYTE_CODE = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # as an installed package has it


def cost(code: str) -> float:
    """Seconds of CPU time of an interpreter that runs it, from start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=WITH_BYTE_CODE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(*, quick: bool) -> list[Table]:
    """Measure it."""
    table = Table(
        "How long does an import take?",
        "CPU time of an interpreter of its own, its start included; the contenders take turns.",
        ("what", "ms", f"of {BARE}", "±"),
    )
    costs: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for code in CONTENDERS.values():
        cost(code)  # the byte code is written, the files are read
    for _ in range(3 if quick else 15):
        for name, code in CONTENDERS.items():
            costs[name].append(cost(code))
    for name, mine in costs.items():
        table.rows.append((name, 1000 * statistics.median(mine), *ratio(mine, costs[BARE])))
    found, _ = ratio(costs[OURS], costs[BARE])
    table.targets[f"import smtpretry costs at most {ALLOWED} times import aiosmtplib: {found:.2f}"] = found <= ALLOWED
    return [table]
