"""How fast smtpretry is, how much it holds and how it behaves: ``python -m tests.benchmarks`` prints it, with targets.

    python -m tests.benchmarks                    # all eight questions, in some twenty-five minutes
    python -m tests.benchmarks overhead manners   # these two
    python -m tests.benchmarks --quick            # all, once, at a small size: the figures mean little
    python -m tests.benchmarks --json             # for machines
    python -m tests.benchmarks --plot examples    # draws what throughput, memory and manners measure, as SVG

Every figure is a ratio, or stands beside what it is to be compared with, out of the same run: the contenders take turns.
The server is `sink.py`, for rates `relay.py`, in a process of its own; for manners a `ScriptedServer` in virtual time.
A missed target is printed as such, and makes no exit code.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # as the tests do: `virtual` and `reliability` stand beside each other
