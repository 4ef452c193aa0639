"""How long threads of torch's operations wait for each other before they sleep.

OpenMP's runtimes spin at first: libgomp for 300,000 rounds, which are several milliseconds, LLVM's and Intel's for 200 ms. A
small model has a few thousand barriers a step, and beside other work each spinning thread keeps the one that it waits for
from its core. Beside two busy loops a step of the default run takes 4.2 times its idle time by libgomp's default, 3.1 times as
set here, and on idle cores no longer than before (two cores, `bench/results/threads_cpu.json`).
"""

from __future__ import annotations

import os

_SETTINGS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Rounds of libgomp; milliseconds of LLVM's and Intel's runtime."""


def bound_spinning() -> None:
    """Have threads sleep soon, in this process and those it starts, unless the user has said how they are to wait.

    The runtime reads this when it is loaded, with `import torch`: where torch is there already, only processes that are started
    from now on follow it.
    """
    if not {"OMP_WAIT_POLICY", *_SETTINGS} & os.environ.keys():
        os.environ.update(_SETTINGS)
