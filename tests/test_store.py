import os
import random
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_align import store
from edge_align.errors import (
    CorruptArtefact,
    EdgeAlignError,
    InputError,
    SessionClosed,
    StorageError,
    UnsupportedVersion,
)
from edge_align.home import Home
from edge_align.records import FeedbackRow, Message, user_prompt
from edge_align.store import Appended, FeedbackLog


def pair(number: int, **changes: object) -> FeedbackRow:
    row = FeedbackRow(prompt=user_prompt(f"question {number}"), chosen=f"good {number}", rejected=f"bad {number}")
    return replace(row, **changes)


def thumb(number: int, label: bool) -> FeedbackRow:
    return FeedbackRow(
        prompt=user_prompt(f"question {number}"),
        completion=f"answer {number}",
        label=label,
        origin="thumb",
        source="kto",
    )


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def log(home):
    with FeedbackLog(home) as log:
        yield log


def test_rows_come_back_oldest_first_and_once_per_profile(log):
    rows = [pair(n) for n in range(1200)]  # more than two pages
    assert log.append("a", rows) == Appended(1200, 0)
    assert log.append("a", [pair(5), pair(2000), pair(2000)]) == Appended(1, 2)
    assert log.append("b", rows[:3]) == Appended(3, 0)
    assert list(log.rows("a")) == [*rows, pair(2000)]
    assert (log.count("a"), log.count("b"), log.count("c")) == (1201, 3, 0)
    assert log.profiles() == ("a", "b")


@pytest.mark.parametrize("newest", [0, 1, 499, 500, 501, 1200, 5000])
def test_the_newest_rows_come_oldest_first(log, newest):
    rows = [pair(n) for n in range(1200)]
    for start in range(0, 1200, 100):  # two profiles, interleaved
        log.append("a", rows[start : start + 100])
        log.append("b", rows[start : start + 100])
    assert list(log.rows("a", newest=newest)) == rows[1200 - min(newest, 1200) :]


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
texts = texts.filter(lambda text: text.strip() != "")
metadata = st.none() | st.text(alphabet=st.characters(), max_size=10)  # with lone surrogates and NULs
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts)


@st.composite
def feedback_rows(draw):
    prompt = (*draw(st.lists(messages, max_size=3)), Message("user", draw(texts)))
    if draw(st.booleans()):
        chosen = draw(texts)
        what = {"chosen": chosen, "rejected": draw(texts.filter(lambda text: text != chosen))}
    else:
        what = {"completion": draw(texts), "label": draw(st.booleans())}
    return FeedbackRow(
        prompt=prompt,
        **what,
        origin=draw(st.sampled_from(["preference", "edit", "siblings", "retry", "compare", "opposed", "thumb"])),
        weight=draw(st.floats(0, 100, exclude_min=True)),
        reason=draw(metadata),
        tags=tuple(draw(st.lists(st.text(max_size=8), max_size=3))),
        ts=draw(metadata),
        model=draw(metadata),
        id=draw(metadata),
        source=draw(st.sampled_from(["native", "trl"])),
    )


def test_any_row_survives_the_log(tmp_path_factory):
    @given(st.lists(feedback_rows(), min_size=1, max_size=4))
    @settings(max_examples=60, deadline=None)
    def check(rows):
        with FeedbackLog(Home(tmp_path_factory.mktemp("home"))) as log:
            log.append("p", rows)
            firsts: dict[str, FeedbackRow] = {}
            for row in rows:
                firsts.setdefault(row.key(), row)
            assert list(log.rows("p")) == [*firsts.values()]

    check()


def test_stats_count_by_kind_origin_and_source(log):
    log.append("p", [pair(1), pair(2, origin="edit"), thumb(3, True), thumb(4, False), thumb(5, False)])
    stats = log.stats("p")
    assert stats.rows == 5
    assert stats.kinds == {"pair": 2, "up": 1, "down": 2}
    assert stats.origins == {"preference": 1, "edit": 1, "thumb": 3}
    assert stats.sources == {"native": 2, "kto": 3}
    assert stats.first_added is not None and stats.last_added is not None and stats.first_added <= stats.last_added
    assert log.stats("other") == store.LogStats(0, {}, {}, {}, None, None)


def test_a_list_is_paged_from_the_newest(log):
    log.append("p", [pair(n) for n in range(10)])
    assert [entry.row for entry in log.list("p", limit=2, offset=1)] == [pair(8), pair(7)]
    assert log.list("p", limit=0) == () and log.list("p", offset=99) == ()


def on_disk(home: Home) -> bytes:
    return b"".join(path.read_bytes() for path in home.root.glob("feedback.db*"))


@pytest.mark.parametrize("how", ["id", "text", "all"])
def test_forgotten_rows_leave_no_byte_behind(home, how):
    secret = "Zanzibar-4711 " * 600  # long enough for overflow pages
    with FeedbackLog(home) as log:
        log.append("p", [pair(n) for n in range(50)])
        log.append("p", [pair(99, chosen=secret)])
        log.append("q", [pair(n) for n in range(5)])
        assert b"Zanzibar-4711" in on_disk(home)
        if how == "id":
            assert log.forget("p", ids=[log.list("p", limit=1)[0].id, 10**6]) == 1
        elif how == "text":
            assert log.forget("p", matching="zANZIBAR") == 1
        else:
            assert log.forget("p", everything=True) == 51
            assert log.profiles() == ("q",)
        assert b"Zanzibar-4711" not in on_disk(home)
        assert log.count("p") == (0 if how == "all" else 50)
        assert log.count("q") == 5
        log.append("p", [pair(99, chosen=secret)])  # what was forgotten can be told again


def test_forget_asks_for_exactly_one_way_to_choose(log):
    log.append("p", [pair(1)])
    for wrong in ({}, {"matching": "  "}, {"ids": [1], "everything": True}, {"ids": [2**70]}):
        with pytest.raises(InputError):
            log.forget("p", **wrong)
    assert log.forget("unknown", everything=True) == 0
    assert log.count("p") == 1


def test_ids_of_another_profile_are_not_forgotten(log):
    log.append("p", [pair(1)])
    log.append("q", [pair(2)])
    assert log.forget("p", ids=[log.list("q")[0].id]) == 0
    assert log.count("q") == 1


def test_rename_moves_the_rows_and_never_merges(log):
    log.append("p", [pair(1)])
    log.append("q", [pair(2)])
    with pytest.raises(InputError, match="already"):
        log.rename("p", "q")
    log.rename("p", "new")
    log.rename("nobody", "x")
    assert log.profiles() == ("new", "q") and list(log.rows("new")) == [pair(1)]


def test_reading_a_home_that_is_not_there_creates_nothing(home):
    with FeedbackLog(home) as log:
        assert log.profiles() == () and log.count("p") == 0 and list(log.rows("p")) == [] and log.list("p") == ()
        assert log.forget("p", everything=True) == 0
        log.rename("p", "q")
        assert log.append("p", []) == Appended(0, 0)
    assert not home.root.exists()


@pytest.mark.parametrize("name", ["../x", "", "a\n", "\ud800"])
def test_bad_profile_names_are_refused_everywhere(log, name):
    calls = [
        lambda: log.append(name, [pair(1)]),
        lambda: log.count(name),
        lambda: list(log.rows(name)),
        lambda: log.stats(name),
        lambda: log.list(name),
        lambda: log.forget(name, everything=True),
        lambda: log.rename("p", name),
    ]
    for call in calls:
        with pytest.raises(InputError):
            call()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_the_database_and_its_side_files_are_private_under_an_open_umask(home):
    before = os.umask(0)
    try:
        with FeedbackLog(home) as log:
            log.append("p", [pair(1)])
            found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.root.glob("feedback.db*")}
            assert found == {"feedback.db": 0o600, "feedback.db-wal": 0o600, "feedback.db-shm": 0o600}
        home.feedback_db.chmod(0o644)
        with FeedbackLog(home) as log:
            log.append("p", [pair(2)])
            assert {stat.S_IMODE(path.stat().st_mode) for path in home.root.glob("feedback.db*")} == {0o600}
    finally:
        os.umask(before)


def test_rows_are_streamed_in_batches_and_those_before_an_error_stay(home):
    def rows():
        yield from (pair(n) for n in range(250))
        raise KeyboardInterrupt

    with FeedbackLog(home, batch_rows=100) as log:
        with pytest.raises(KeyboardInterrupt):
            log.append("p", rows())
        assert list(log.rows("p")) == [pair(n) for n in range(200)]


def test_long_rows_make_short_batches(home, monkeypatch):
    monkeypatch.setattr(store, "BATCH_CHARACTERS", 1000)
    seen = []

    def rows():
        for n in range(4):
            with sqlite3.connect(home.feedback_db) as other:
                seen.append(other.execute("SELECT COUNT(*) FROM rows").fetchone()[0])
            other.close()
            yield pair(n, chosen="x" * 600)

    with FeedbackLog(home) as log:
        log.append("p", [pair(99)])
        log.append("p", rows())
    assert seen == [1, 1, 3, 3]


def test_use_after_close_is_refused_and_closing_twice_is_fine(home):
    log = FeedbackLog(home)
    log.append("p", [pair(1)])
    log.close()
    log.close()
    with pytest.raises(SessionClosed):
        log.count("p")


def test_a_migration_runs_with_its_record_or_not_at_all(home, monkeypatch):
    with FeedbackLog(home) as log:
        log.append("p", [pair(1)])
    good = (*store.MIGRATIONS, ("CREATE TABLE later (x)",))
    monkeypatch.setattr(store, "MIGRATIONS", (*good[:-1], (*good[-1], "CREATE TABLE later (x)")))
    with FeedbackLog(home) as log, pytest.raises(EdgeAlignError):
        log.count("p")
    with sqlite3.connect(home.feedback_db) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        assert raw.execute("SELECT 1 FROM sqlite_master WHERE name = 'later'").fetchone() is None
    raw.close()
    monkeypatch.setattr(store, "MIGRATIONS", good)
    with FeedbackLog(home) as log:
        assert list(log.rows("p")) == [pair(1)]
    monkeypatch.undo()
    with FeedbackLog(home) as log, pytest.raises(UnsupportedVersion, match="upgrade"):
        log.append("p", [pair(2)])


def test_a_foreign_database_is_not_touched(home):
    home.root.mkdir()
    raw = sqlite3.connect(home.feedback_db)
    raw.execute("CREATE TABLE theirs (x)")
    raw.commit()
    raw.close()
    before = home.feedback_db.read_bytes()
    with FeedbackLog(home) as log, pytest.raises(CorruptArtefact, match="not an edge-align"):
        log.append("p", [pair(1)])
    assert home.feedback_db.read_bytes() == before


def test_damage_anywhere_raises_our_error_or_leaves_every_row_true(home):
    rows = [pair(n) for n in range(150)]
    with FeedbackLog(home) as log:
        log.append("p", rows)
    intact = home.feedback_db.read_bytes()
    rng = random.Random(0)
    found = 0
    for trial in range(120):
        body = bytearray(intact)
        if trial % 4 == 0:
            body = body[: rng.randrange(1, len(body))]
        else:
            start = rng.randrange(len(body) if trial % 2 else 100)
            for at in range(start, min(start + rng.choice([1, 20, 500]), len(body))):
                body[at] = rng.randrange(256)
        home.feedback_db.write_bytes(body)
        with FeedbackLog(home) as log:
            try:
                read = list(log.rows("p"))
                assert all(row in rows for row in read)
                log.profiles()
                log.stats("p")
                log.append("p", [pair(1000 + trial)])
                log.forget("p", matching="question 7")
            except EdgeAlignError as error:
                found += 1
                assert isinstance(error, CorruptArtefact | UnsupportedVersion | StorageError), error
                assert str(home.feedback_db) in str(error) and "\n" not in str(error)
                if isinstance(error, CorruptArtefact):
                    assert "profiles are untouched" in str(error) and "feedback.db*" in str(error)
        for side in home.root.glob("feedback.db-*"):
            side.unlink()
    assert found > 40


def test_one_changed_letter_in_a_row_is_noticed(home):
    with FeedbackLog(home) as log:
        log.append("p", [pair(n) for n in range(100)])
    intact = home.feedback_db.read_bytes()
    for old, new in ((b"good 77", b"gooD 77"), (b'"weight":1.0', b'"weight":9.0')):
        home.feedback_db.write_bytes(intact.replace(old, new, 1))
        with FeedbackLog(home) as log, pytest.raises(CorruptArtefact, match="not what was written"):
            list(log.rows("p"))


def test_junk_instead_of_a_database_is_named_and_kept(home):
    home.root.mkdir()
    home.feedback_db.write_bytes(b"junk" * 1000)
    with FeedbackLog(home) as log:
        for call in (lambda: log.count("p"), lambda: log.append("p", [pair(1)])):
            with pytest.raises(CorruptArtefact, match="damaged .*profiles are untouched; move feedback.db"):
                call()
    assert home.feedback_db.read_bytes() == b"junk" * 1000


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


APPEND = """
import sys
from pathlib import Path
from edge_align.home import Home
from edge_align.records import FeedbackRow, user_prompt
from edge_align.store import FeedbackLog
root, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rows = (FeedbackRow(prompt=user_prompt(f"question {n}"), chosen=f"good {n}", rejected=f"bad {n}")
        for n in range(first, first + count))
"""


def test_two_processes_append_at_once_and_nothing_is_lost_or_doubled(home):
    code = APPEND + "with FeedbackLog(Home(root), batch_rows=20) as log: print(log.append('p', rows).added)"
    running = [python(code, home.root, first, 400) for first in (0, 0, 300)]  # overlapping; all create the file
    added = []
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        added.append(int(out))
    assert sum(added) == 700
    with FeedbackLog(home) as log:
        assert sorted(log.rows("p"), key=lambda row: int(row.chosen.split()[1])) == [pair(n) for n in range(700)]


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
@pytest.mark.parametrize("room", [20_000, 120_000])  # fails when it is set up; fails in the middle
def test_a_full_disk_is_a_storage_error_and_what_was_stored_stays(home, room):
    with FeedbackLog(home) as log:
        log.append("p", [pair(n) for n in range(20)])
    code = (
        APPEND
        + f"""
import resource
from edge_align.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
with FeedbackLog(Home(root), batch_rows=20) as log:
    try: log.append('p', rows)
    except StorageError as error: print(error)
"""
    )
    out, err = python(code, home.root, 20, 20_000).communicate(timeout=60)
    assert str(home.feedback_db) in out and out.count("\n") == 1, err
    with FeedbackLog(home) as log:
        count = log.count("p")
        assert count % 20 == 0 and (20 if room < 100_000 else 41) <= count < 20_020
        assert list(log.rows("p")) == [pair(n) for n in range(count)]
        assert log.append("p", [pair(-1)]).added == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc cannot be written to by anyone")
def test_a_home_that_cannot_be_written_is_a_storage_error():
    from pathlib import Path

    with FeedbackLog(Home(Path("/proc/edge-align"))) as log:
        assert log.count("p") == 0
        with pytest.raises(StorageError, match="/proc/edge-align"):
            log.append("p", [pair(1)])


def test_a_writer_that_holds_the_file_for_too_long_is_named(home, monkeypatch):
    monkeypatch.setattr("edge_align.database.BUSY_SEC", 0.05)
    with FeedbackLog(home) as log:
        log.append("p", [pair(1)])
        other = sqlite3.connect(home.feedback_db, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another edge-align process"):
            log.append("p", [pair(2)])
        assert log.count("p") == 1  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert log.append("p", [pair(2)]).added == 1
