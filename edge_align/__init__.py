"""On-device personalisation of a local language model (see README.md). Importing this package loads nothing."""

import os

__version__ = "0.1.0"

SPINS = 200
"""How often a waiting thread of GCC's OpenMP looks for the others before it sleeps (libgomp's own: 300,000)."""

# llama.cpp and PyTorch read it when they are loaded. Beside another busy program, threads that look for milliseconds
# take from the others the core they need, and both stand still (docs/decisions/0013).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
