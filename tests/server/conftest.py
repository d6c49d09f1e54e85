"""One fake server for the tests that change nothing on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import fake_engine, Live, serving

from edge_align.home import Home


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server on the fake backend, without keys; the profiles ann, bob and cat have folders."""
    home = Home(tmp_path_factory.mktemp("fake") / "home")
    for name in ("ann", "bob", "cat"):
        (home.profiles_dir / name).mkdir(parents=True)
    with serving(home, open_engine=fake_engine()) as live:
        yield live
