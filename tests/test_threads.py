"""How long threads wait for each other awake: what libgomp itself says, when it is loaded, that it was told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edge_align import SPINS

LLAMA = "from edge_align.runtime.llama_native import api; api()"
TORCH = "import edge_align.learning, torch"


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP is what Linux has")
@pytest.mark.parametrize("first", [LLAMA, TORCH], ids=["llama.cpp", "PyTorch"])
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, f"GOMP_SPINCOUNT = '{SPINS}'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
    ids=["ours", "a user's", "a user's policy"],
)
def test_waiting_threads_soon_sleep_and_a_users_setting_stands(first: str, own: dict[str, str], expected: str) -> None:
    told = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = told | own | {"OMP_DISPLAY_ENV": "verbose"}
    script = f"{first}\n{LLAMA}\n{TORCH}"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if expected.split(" = ")[0] in line]
    assert said and all(expected in line for line in said)
