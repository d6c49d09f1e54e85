"""personalize in processes of its own: killed in every stage, and two at once."""

import random
import signal
import subprocess
import sys
import time

import pytest
from reference.verdicts import TOPICS, verdict, write

from edge_align.config import RuntimeConfig
from edge_align.home import Home
from edge_align.personalize import personalize
from edge_align.profiles import ProfileStore
from edge_align.store import FeedbackLog

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")

STAGES = ("read", "read 1.0", "encode", "fit", "calibrate", "check", "save", "version")
RUN = """
import sys
from pathlib import Path
from edge_align.config import PersonalizeConfig, RuntimeConfig
from edge_align.errors import EdgeAlignError
from edge_align.home import Home
from edge_align.personalize import personalize, Source

print("ready", flush=True)
path = Path(sys.argv[2])
try:
    report = personalize(
        home=Home(Path(sys.argv[1])), sources=[Source(path.name, path)], runtime=RuntimeConfig(n_threads=1, n_ctx=512),
        config=PersonalizeConfig(nll_limit=100.0, collision_limit=0.0),  # checked, and never lowered: that takes long
        progress=lambda stage, done: print(stage, done, flush=True),
    )
except EdgeAlignError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print("version", report.version, report.activated, flush=True)
"""


def start(home: Home, feedback) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(home.root), str(feedback)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_kill_at_any_point_leaves_the_log_complete_and_a_usable_profile(toy_home, tmp_path):
    rng, store = random.Random(4), ProfileStore(toy_home)
    out, err = start(toy_home, write(tmp_path / "first.jsonl", TOPICS[:16])).communicate(timeout=120)
    assert out.endswith("version 1 True\n"), err
    logged = 16
    for n, stage in enumerate(STAGES):
        process = start(toy_home, write(tmp_path / f"{n}.jsonl", [TOPICS[16 + n]]))
        said = [""]
        while process.stdout is not None and not said[-1].startswith(stage):
            said.append(process.stdout.readline())
            assert said[-1], f"it ended before {stage}: {process.communicate()[1]}"
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL or "version" in out
        with FeedbackLog(toy_home) as log:
            rows = list(log.rows("default"))
        if "read 1.0" in "".join([*said, out]):  # the promise: rows are on the disk before anything is learnt
            assert rows[-1].chosen == verdict(TOPICS[16 + n])["chosen"]
        assert logged <= len(rows) <= logged + 1
        logged = len(rows)
        usable = store.load_usable("default")
        assert usable.reason is None and store.current() == "default"
        for number in store.versions("default"):
            store.load("default", number)
    report = personalize(home=toy_home, runtime=RuntimeConfig(n_threads=1, n_ctx=512))
    assert report.rows["logged"] == logged and report.state == "learnt" and report.activated
    assert store.active_version("default") == report.version


def test_of_two_processes_at_once_one_learns_and_the_other_says_why_not(toy_home, tmp_path):
    first = start(toy_home, write(tmp_path / "a.jsonl", TOPICS[:10]))
    assert first.stdout is not None and first.stdout.readline() == "read 0.0\n"  # it holds the profile now
    second = start(toy_home, write(tmp_path / "b.jsonl", TOPICS[10:20]))
    out, err = second.communicate(timeout=120)
    assert second.returncode == 1 and not out
    assert err.splitlines()[-1].startswith("StorageError: another edge-align process is working on profile default")
    out, err = first.communicate(timeout=120)
    assert out.splitlines()[-1].startswith("version 1"), err
    with FeedbackLog(toy_home) as log:
        assert log.count("default") == 10
