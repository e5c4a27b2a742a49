"""The law of the house: imports go down, never up and never in a circle; what decides knows nothing of sockets."""

from __future__ import annotations

import ast
from pathlib import Path

import smtpretry

ROOT = Path(smtpretry.__file__).parents[1]
SOCKETS = {"asyncio", "socket", "ssl", "selectors", "threading"}
NO_IO = (
    "replies",
    "addresses",
    "flatten",
    "mime",
    "outcome",
    "stored",
    "notification",
    "delivery",
    "events",
    "stats",
    "policy",
    "envelope",
    "esmtp",
    "ledger",
    "verdict",
)
FLOORS = (  # from the ground up: a room imports from its own floor, and from those below it
    ("replies",),
    ("addresses", "clock", "flatten", "mime"),
    (
        "outcome",
        "stored",
        "notification",
        "delivery",
        "events",
        "stats",
        "log",
        "observer",
        "policy",
        "envelope",
        "esmtp",
        "ledger",
        "verdict",
    ),
    ("errors",),
    ("session",),
    ("attempt",),
    ("queues",),
    ("instrumentation",),
    ("bulk", "checks", "client", "decorator", "failover", "oneshot", "sending", "typing"),
    ("blocking", "calls"),
    ("django",),
    ("", "testing", "cli", "__main__"),
)


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in (ROOT / "smtpretry").rglob("*.py")}


def imports(name: str) -> set[str]:
    """Return the full names of the modules that a module imports, for types too."""
    found, file = set[str](), FILES[name]
    package = (name if file.name == "__init__.py" else name.rpartition(".")[0]).split(".")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            found |= {f"{base}.{one.name}" if f"{base}.{one.name}" in FILES else base for one in node.names}
    return found


def floor(name: str) -> int:
    room = name.partition(".")[2].partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_go_down():
    """No module imports from a floor above its own, not even for a type."""
    up = [f"{name} imports {one}" for name in FILES for one in imports(name) & FILES.keys() if floor(one) > floor(name)]
    assert not up


def test_no_circle():
    """No module imports itself by way of others."""
    done = set[str]()

    def walk(*path: str) -> None:
        for one in (imports(path[-1]) & FILES.keys()) - done:
            assert one not in path, " -> ".join((*path, one))
            walk(*path, one)
        done.add(path[-1])

    for name in FILES:
        walk(name)


def test_what_decides_does_no_io():
    """The rooms that decide import nothing that could talk to anybody."""
    talkative = {
        name: found
        for name in FILES
        if name.partition(".")[2].partition(".")[0] in NO_IO
        and (found := {one.partition(".")[0] for one in imports(name)} & SOCKETS)
    }
    assert not talkative
