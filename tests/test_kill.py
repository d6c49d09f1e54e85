"""kill -9 at random moments: what was promised is there, what was not is absent, and everything opens."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_align.home import Home
from edge_align.profiles import ProfileStore
from edge_align.store import FeedbackLog

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")

BATCH = 25

APPEND = f"""
import sys
from pathlib import Path
from edge_align.home import Home
from edge_align.records import FeedbackRow, user_prompt
from edge_align.store import FeedbackLog

def rows(first):
    for n in range(first, 10**9):
        if n > first and n % {BATCH} == 0:
            print(n, flush=True)  # asked for the row after a batch: all before it must be on the disk
        yield FeedbackRow(prompt=user_prompt(f"question {{n}}"), chosen=f"good {{n}} " * 20, rejected=f"bad {{n}}")

with FeedbackLog(Home(Path(sys.argv[1])), batch_rows={BATCH}) as log:
    first = log.count("p")
    print(first, flush=True)
    log.append("p", rows(first))
"""

SAVE = """
import sys
from pathlib import Path
import numpy as np
from edge_align.home import Home
from edge_align.profiles import ProfileStore

store = ProfileStore(Home(Path(sys.argv[1])))
print(0, flush=True)
while True:
    number = max(store.versions("p"), default=0) + 1 if "p" in store.names() else 1
    version = store.save("p", {"mu": np.full(500, number, np.float32)}, {"number": number})
    store.activate("p", version.number)
    store.use("p")
    print(version.number, flush=True)
    if version.number % 4 == 0:
        store.undo("p")
        store.activate("p", version.number)
"""

FORGET = """
import sys
from pathlib import Path
from edge_align.home import Home
from edge_align.store import FeedbackLog

with FeedbackLog(Home(Path(sys.argv[1]))) as log:
    print(0, flush=True)
    for n in range(10**9):
        log.forget("p", matching=f"question {n:04d}")  # of one length: none holds another
        print(n, flush=True)
"""


def killed_at_random(code: str, root: Path, rng: random.Random) -> int:
    """Run `code` until some moment after its first line, kill it, and return the last number it printed."""
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = process.stdout.readline()
    time.sleep(rng.uniform(0, 0.06))
    process.kill()
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, "the process ended by itself"
    whole = [line for line in (last + rest).splitlines(keepends=True) if line.endswith("\n")]
    return int(whole[-1])


def test_a_killed_append_leaves_a_prefix_of_whole_batches(tmp_path):
    rng, home = random.Random(1), Home(tmp_path)
    counts = []
    for _ in range(12):
        promised = killed_at_random(APPEND, tmp_path, rng)
        with FeedbackLog(home) as log:
            chosen = [row.chosen for row in log.rows("p")]
        counts.append(len(chosen))
        assert len(chosen) >= promised and len(chosen) % BATCH == 0
        assert chosen == [f"good {n} " * 20 for n in range(len(chosen))]
    assert len(set(counts)) > 3, counts  # the kills did strike while rows were being written


def test_a_killed_save_leaves_an_active_version_that_opens(tmp_path):
    rng, store = random.Random(2), ProfileStore(Home(tmp_path))
    last = 0
    for _ in range(12):
        promised = killed_at_random(SAVE, tmp_path, rng)
        if "p" not in store.names():
            assert promised == 0
            continue
        versions = store.versions("p")
        assert len(versions) >= last and max(versions, default=0) >= promised
        for number in versions:
            tensors, manifest = store.load("p", number)
            assert tensors["mu"].shape == (500,) and (tensors["mu"] == manifest["number"]).all()
        if promised:
            usable = store.load_usable("p")
            assert usable.reason is None
            assert usable.version >= promised or promised % 4 == 0  # then an undo may have been under way
            assert store.current() == "p"
        last = len(versions)
    assert last > 3
    number = store.save("p", {"mu": tensors["mu"]}, {}).number
    store.activate("p", number)
    assert store.load_usable("p").version == number
    assert not [path for path in tmp_path.rglob(".*") if path.parent.name[0] != "v"], "half-written files were swept"


def test_a_killed_forget_deletes_whole_rows_and_the_log_opens(tmp_path):
    from edge_align.records import FeedbackRow, user_prompt

    rng = random.Random(3)
    rows = [FeedbackRow(prompt=user_prompt(f"question {n:04d} ?"), chosen="good", rejected="bad") for n in range(2000)]
    with FeedbackLog(Home(tmp_path)) as log:
        log.append("p", rows)
    for _ in range(5):
        promised = killed_at_random(FORGET, tmp_path, rng)
        with FeedbackLog(Home(tmp_path)) as log:
            left = list(log.rows("p"))
        assert left == rows[len(rows) - len(left) :]
        assert len(rows) - len(left) >= promised
