"""On-device personalisation of a local language model (see README.md). Importing this package loads nothing."""

import os
import sys

__version__ = "0.1.0"


def _vendor() -> str:
    """Whose the processor is, as Linux says it; elsewhere nothing."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


SPINS = {"GenuineIntel": 1000}.get(_vendor(), 200)
"""How often a waiting thread of GCC's OpenMP looks for the others before it sleeps (libgomp's own: 300,000)."""

# llama.cpp and PyTorch read it when they are loaded. Beside another busy program, threads that look for milliseconds
# take from the others the core they need, and both stand still. The policy matters where threads are thought to be more
# than cores, as with a team for each of the two: then libgomp takes 1,000 looks at most instead of 100
# (docs/decisions/0013).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    if sys.platform == "linux":
        os.environ["OMP_WAIT_POLICY"] = "active"

# Since 1.32 ONNX Runtime's own Linux builds keep a device id in the user's cache and have an address to send events to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
