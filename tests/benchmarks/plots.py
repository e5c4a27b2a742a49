"""The figures as pictures, which GitHub shows on white and on black: nothing but greys and colours that stand on both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from . import manners, throughput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .harness import Table

OURS, OTHERS, TEXT, FAINT = "#2f81f7", "#8b949e", "#7d8590", "#7d859040"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and to be selected
    "svg.hashsalt": "smtpretry",  # the same figures, the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "ytick.left": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,  # inches: the reader's fonts may be wider
    "figure.constrained_layout.h_pad": 0.06,
}


def bars(axes: Axes, title: str, names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    """Horizontal ones, the first on top, each with its figure."""
    drawn = axes.barh(names, values, color=[colour(name) for name in names], height=0.6)
    axes.bar_label(drawn, labels, padding=4, color=TEXT)
    axes.set_title(title, loc="left")
    axes.invert_yaxis()
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.set_xticks([])
    axes.margins(x=0.25)


def colour(name: str) -> str:
    return OURS if "smtpretry" in name or "RetryingSMTP" in name else OTHERS


def draw_memory(tables: Sequence[Table]) -> Figure:
    figure = Figure(figsize=(8, 2.5))
    names, held = zip(*[row[:2] for row in tables[0].rows], strict=True)
    bars(
        figure.subplots(), "Memory of a send of 1 KB that waits", names, held, [f"{one / 1024:.1f} KB" for one in held]
    )
    return figure


def draw_throughput(tables: Sequence[Table]) -> Figure:
    figure = Figure(figsize=(8, 4))
    for axes, case in zip(figure.subplots(len(throughput.CASES)), throughput.CASES, strict=True):
        names, rates = zip(*[row[1:3] for row in tables[0].rows if row[0] == case], strict=True)
        bars(axes, f"Messages a second, {case}", names, rates, [f"{rate:,.0f}" for rate in rates])
    return figure


def draw_network(tables: Sequence[Table]) -> Figure | None:
    if not tables[1].rows:
        return None
    figure = Figure(figsize=(8, 3.4))
    numbers, ours, _, others, _ = zip(*tables[1].rows, strict=True)
    axes = figure.subplots()
    axes.plot(numbers, ours, color=OURS, marker="o", label="RetryingSMTP, max_connections=N")
    axes.plot(numbers, others, color=OTHERS, marker="o", label="aiosmtplib.send for each, N tasks")
    axes.set_title("Messages a second, with 20 ms of network delay", loc="left")
    axes.set_xticks(numbers)
    axes.set_xlabel("connections (N)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT)
    axes.legend()
    return figure


def draw_busy(tables: Sequence[Table]) -> Figure:
    figure = Figure(figsize=(8, 2.4))
    names, refused, _, taken, *_ = zip(*tables[0].rows, strict=True)
    title = f"{tables[0].title} for a minute: connections that it refused"
    labels = [f"{one:,} ({mails or 'no'} mails in)" for one, mails in zip(refused, taken, strict=True)]
    bars(figure.subplots(), title, names, refused, labels)
    return figure


def draw_greylisting(_: Sequence[Table]) -> Figure:
    """When a mail is offered to a greylisting server, until it is taken."""
    figure = Figure(figsize=(9.5, 3.4))
    ways = [name for name in manners.WAYS if name not in (manners.RECIPE, manners.STAMINA)]
    for panel, window in zip(figure.subplots(1, len(manners.WINDOWS)), manners.WINDOWS, strict=True):
        end = window / 60
        panel.axvspan(0, end, color=FAINT, linewidth=0)
        for row, name in enumerate(ways):
            courses = manners.courses(name, window, 1)
            *before, last = (at / 60 for at in courses[len(courses) // 2].attempts)
            panel.plot([end, last], [row, row], color=colour(name), linewidth=2)
            panel.plot(before, [row] * len(before), "x", color=colour(name), markersize=5, clip_on=False)
            panel.plot(last, row, "o", color=colour(name), markersize=6, clip_on=False)
        panel.set_title(f"{end:.0f} min of greylisting", loc="left")
        panel.set_xlim(0, max(18, 2 * end))
        panel.set_xlabel("minutes; x refused, o taken")
        panel.set_yticks(range(len(ways)), ways if window == manners.WINDOWS[0] else [""] * len(ways))
        panel.invert_yaxis()
        panel.spines["left"].set_visible(False)
    return figure


DRAWINGS = {
    "throughput": {"throughput": draw_throughput, "network": draw_network},
    "memory": {"memory": draw_memory},
    "manners": {"busy": draw_busy, "greylisting": draw_greylisting},
}
"""The pictures of each question, one idea each."""


def draw(directory: Path, tables: Mapping[str, Sequence[Table]]) -> list[Path]:
    """Draw what was measured and can be drawn, and return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        for question in tables:
            for name, drawing in DRAWINGS.get(question, {}).items():
                if (figure := drawing(tables[question])) is not None:
                    paths.append(directory / f"{name}.svg")
                    figure.savefig(paths[-1], transparent=True, metadata={"Date": None})
    return paths
