"""How long the threads of GCC's OpenMP, which compute for llama.cpp on Linux, wait for each other awake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = 200
"""Looks that a waiting thread takes before it sleeps: microseconds. libgomp's own 300,000 are milliseconds."""


@contextmanager
def short_waits() -> Iterator[None]:
    """An OpenMP that is loaded in this block waits shortly; the environment is as before afterwards.

    llama.cpp's threads meet hundreds of times a token. Beside another busy program, one that looks for the others all
    its time takes from them the core they need: two engines then stand still (docs/decisions/0013). A user's own
    GOMP_SPINCOUNT or OMP_WAIT_POLICY stands.
    """
    ours = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if ours:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        yield
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]
