"""The process that learns a profile anew: one JSON request on stdin, one JSON report on stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Learn on one thread, activate only what is no worse than the active version on verdicts new to it."""
    request = json.load(sys.stdin)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: answers need the other cores

    from edge_align.config import PersonalizeConfig, RuntimeConfig
    from edge_align.errors import EdgeAlignError
    from edge_align.home import Home
    from edge_align.personalize import personalize

    try:
        report = personalize(
            home=Home(Path(request["home"])),
            profile=request["profile"],
            model=request["model"],
            config=PersonalizeConfig(no_worse=True, use=False),
            runtime=RuntimeConfig(n_threads=1),
        ).to_dict()
        report["rows"]["dropped"] = []
    except EdgeAlignError as error:
        report = {"state": "failed", "activated": False, "reason": type(error).__name__}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
