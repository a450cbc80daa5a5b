"""How long the threads of a training run spin before they sleep. To be imported before torch, which loads OpenMP.

In an update threads wait for each other at thousands of places. GNU's OpenMP lets a thread spin there for milliseconds,
since what it waits for is likely to come at once. Where another program has the processor of the thread that it waits
for, all of that is lost: beside one or two busy programs a run is several times slower (benchmarks/busy_machine.py).
Some hundreds of microseconds are enough on a quiet machine.
"""

from __future__ import annotations

import os

SPINS = 10_000
"""Some hundreds of microseconds."""

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
