"""The enumeration: whatever breaks, wherever, nobody is left without an end, nothing is lost, and nothing comes twice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import faults
import pytest
import virtual

if TYPE_CHECKING:
    from collections.abc import Callable

DONE: Counter[str] = Counter()  # cells by place, in this process


@pytest.mark.parametrize("place", faults.PLACES, ids=str)
def test_every_fault_at(place: faults.Place) -> None:
    """Each fault at this place ends with what the server really did, reported alike by delivery, result and exception."""
    runs = [virtual.run(faults.run(cell)) for cell in faults.cells(place)]
    DONE[str(place)] = len(runs)
    failed = [run for run in runs if run.problems]
    assert not failed, f"{len(failed)} of {len(runs)} cells:\n" + "\n".join(map(str, failed))
    assert sum(run.lost for run in runs) == 0
    assert sum(run.twice for run in runs if run.cell.mode == "raise" or not run.cell.dot_is_out) == 0


def test_the_matrix_is_large(record_property: Callable[[str, object], None]) -> None:
    """More than 2500 cells are tried: the tests' part of the matrix, which `python -m tests.reliability` runs in full."""
    number = sum(len(list(faults.cells(place))) for place in faults.PLACES)
    record_property("cells", number)
    assert number > 2500
    if len(DONE) == len(faults.PLACES):
        assert DONE.total() == number
