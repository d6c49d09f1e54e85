"""`edge-align feedback`: what is in the log, how it gets there and how it is forgotten."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, UTC
from pathlib import Path
from typing import Any

import click

from edge_align.cli.options import App, confirm, json_option, profile_option, read_value, stdin_bytes
from edge_align.cli.output import emit_json, one_line, plural, say, shorten, show_facts, show_table, write
from edge_align.cli.report import dropped_lines
from edge_align.errors import InputError
from edge_align.feedback.export import to_line, to_trl
from edge_align.feedback.read import read_feedback
from edge_align.files import check_name, write_atomic
from edge_align.pairs import build, count_by_origin
from edge_align.records import DroppedRow, FeedbackRow, user_prompt
from edge_align.server.answers import AnswerStore
from edge_align.store import FeedbackLog

LISTED_DROPPED = 1000  # dropped rows named in JSON; a file may have millions

log_profile = profile_option("Profile whose log it is.")
user_option = click.option("--user", metavar="ID", help="Whose verdicts to read from a chat export of several users.")


@click.group("feedback")
def command() -> None:
    """Add, inspect, export and forget feedback.

    The log keeps every verdict of every profile on this machine, readable by you alone.
    """


@dataclass
class Reading:
    """Counts over the rows of some files, kept while they stream by."""

    kinds: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    dropped: list[DroppedRow] = field(default_factory=list)
    dropped_count: int = 0

    @property
    def usable(self) -> int:
        return self.kinds.total()

    def rows(self, files: Sequence[str], user: str | None) -> Iterator[FeedbackRow]:
        """The usable rows of all files in order; the others are counted."""
        for name in files:
            label = "stdin" if name == "-" else name
            for item in read_feedback(stdin_bytes() if name == "-" else Path(name), name=label, user=user):
                if isinstance(item, DroppedRow):
                    self.dropped_count += 1
                    if len(self.dropped) < LISTED_DROPPED:
                        self.dropped.append(item)
                else:
                    self.kinds["pair" if item.is_pair else "up" if item.label else "down"] += 1
                    self.formats[item.source] += 1
                    yield item

    def document(self) -> dict[str, Any]:
        return {
            "read": self.usable + self.dropped_count,
            "usable": self.usable,
            "kinds": dict(self.kinds),
            "formats": dict(self.formats),
            "dropped_count": self.dropped_count,
            "dropped": [{"file": row.file, "line": row.line, "reason": row.reason} for row in self.dropped],
        }

    def facts(self) -> list[tuple[str, str]]:
        document = self.document()
        facts = [("Rows", f"{document['read']:,} read, {self.usable:,} usable, {self.dropped_count:,} dropped")]
        more = self.dropped_count - len(self.dropped)
        facts += [("", line) for line in dropped_lines(document["dropped"], more=more)]
        if self.usable:
            facts += [("Kinds", _counts(self.kinds)), ("Formats", _counts(self.formats))]
        return facts

    def finish(self, ctx: click.Context) -> None:
        """Exit with code 2, after the report, when no row of the files can be used."""
        if not self.usable:
            say("Error: no row can be used; `edge-align feedback validate --help` names the known formats")
            ctx.exit(2)


@command.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@log_profile
@user_option
@json_option
@click.pass_context
def import_(ctx: click.Context, files: tuple[str, ...], profile: str, user: str | None) -> None:
    """Add the feedback in files to the log, each verdict once.

    Reads every format that `personalize` reads; `-` is stdin. Rows that cannot be used are named and skipped.
    """
    app = ctx.find_object(App) or App()
    check_name("profile", profile)
    reading = Reading()
    with FeedbackLog(app.home) as log:
        appended = log.append(profile, reading.rows(files, user))
    if app.json:
        more = {"profile": profile, "added": appended.added, "duplicates": appended.duplicates}
        emit_json(more | reading.document())
    else:
        logged = f"{plural(appended.added, 'row')} added to {profile}, {appended.duplicates:,} were there already"
        show_facts([*reading.facts(), ("Log", logged)])
    reading.finish(ctx)


@command.command("validate")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@user_option
@json_option
@click.pass_context
def validate(ctx: click.Context, files: tuple[str, ...], user: str | None) -> None:
    """Read files and say what is in them, without keeping anything.

    Known formats, also mixed row by row: prompt with chosen and rejected or with completion and label (as JSON lines,
    JSON array or CSV; TRL and KTO types included), HH-RLHF transcripts, UltraFeedback, OpenAI preferences, and the
    feedback that Open WebUI and GPT4All export. Exits with code 2 when no row can be used.
    """
    app = ctx.find_object(App) or App()
    reading = Reading()
    for _row in reading.rows(files, user):
        pass
    if app.json:
        emit_json(reading.document())
    else:
        show_facts(reading.facts())
    reading.finish(ctx)


@command.command("add")
@click.option("--prompt", metavar="TEXT", required=True, help="What was asked.")
@click.option("--system", metavar="TEXT", help="The system prompt, if there was one.")
@click.option("--chosen", metavar="TEXT", help="The better answer; with --rejected.")
@click.option("--rejected", metavar="TEXT", help="The worse answer; with --chosen.")
@click.option("--completion", metavar="TEXT", help="A single answer; with --up or --down.")
@click.option("--up", is_flag=True, show_default=False, help="The answer is good.")
@click.option("--down", is_flag=True, show_default=False, help="The answer is bad.")
@click.option("--reason", metavar="TEXT", help="Why, for yourself.")
@click.option("--tag", "tags", metavar="TEXT", multiple=True, help="A word to find it by; may be repeated.")
@log_profile
@json_option
@click.pass_obj
def add(
    app: App,
    prompt: str,
    system: str | None,
    chosen: str | None,
    rejected: str | None,
    completion: str | None,
    up: bool,
    down: bool,
    reason: str | None,
    tags: tuple[str, ...],
    profile: str,
) -> None:
    """Log one verdict: a better and a worse answer, or a thumb up or down.

    TEXT may be `@FILE` to read a file (`@@...` for text that begins with @), and one of them `-` to read stdin.
    """
    check_name("profile", profile)
    if up and down:
        raise InputError("give --up or --down, not both")
    if (completion is not None) != (up or down):
        raise InputError("--completion goes with --up or --down")
    if (chosen is None) != (rejected is None) or (chosen is None) == (completion is None):
        raise InputError("give --chosen and --rejected, or --completion and a thumb")
    given = {"prompt": prompt, "system": system, "chosen": chosen, "rejected": rejected, "completion": completion}
    if [*given.values()].count("-") > 1:
        raise InputError("only one value can come from stdin")
    texts = {name: None if value is None else read_value(value, name=name, files=True) for name, value in given.items()}
    row = FeedbackRow(
        prompt=user_prompt(texts["prompt"] or "", system=texts["system"]),
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        completion=texts["completion"],
        label=None if texts["completion"] is None else up,
        origin="preference" if texts["completion"] is None else "thumb",
        reason=reason,
        tags=tags,
        ts=datetime.now(UTC).isoformat(timespec="microseconds"),  # a verdict that is repeated later counts again
    )
    with FeedbackLog(app.home) as log:
        log.append(profile, [row])
        rows = log.count(profile)
    if app.json:
        emit_json({"profile": profile, "added": 1, "rows": rows})
    else:
        write(f"Logged; {profile} has {plural(rows, 'row')} now.\n")


@command.command("list")
@log_profile
@click.option("--limit", type=click.IntRange(min=1), default=20, help="Most rows.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Newer rows to pass over.")
@json_option
@click.pass_obj
def list_(app: App, profile: str, limit: int, offset: int) -> None:
    """Show logged verdicts, the newest first."""
    with FeedbackLog(app.home) as log:
        found = log.list(profile, limit=limit, offset=offset)
        total = log.count(profile)
    if app.json:
        rows = [{"id": logged.id, "added": logged.added, "row": to_trl(logged.row)} for logged in found]
        emit_json({"profile": profile, "total": total, "rows": rows})
        return
    if not found:
        say(f"No feedback for {profile} {'here' if total else 'yet'}.")
        return
    cells = []
    for logged in found:
        row = logged.row
        kind = "pair" if row.is_pair else "up" if row.label else "down"
        answer = row.chosen if row.chosen is not None else row.completion or ""
        question = shorten(row.prompt[-1].content, 36)
        cells.append((str(logged.id), logged.added[:10], kind, row.origin, question, shorten(answer, 36)))
    show_table(("id", "added", "kind", "origin", "prompt", "preferred or rated answer"), cells, right=("id",))
    if offset + len(found) < total:
        say(f"{plural(total, 'row')} in all; --offset {offset + len(found)} shows the next ones.")


@command.command("stats")
@log_profile
@json_option
@click.pass_obj
def stats(app: App, profile: str) -> None:
    """Count the log of a profile, and the pairs that training makes of it."""
    from edge_align.personalize import NEWEST

    with FeedbackLog(app.home) as log:
        counts = log.stats(profile)
        dataset = build(log.rows(profile, newest=NEWEST))
    pairs = count_by_origin(dataset.pairs)
    if app.json:
        emit_json(
            {
                "profile": profile,
                "rows": counts.rows,
                "kinds": counts.kinds,
                "origins": counts.origins,
                "sources": counts.sources,
                "first_added": counts.first_added,
                "last_added": counts.last_added,
                "pairs": pairs,
                "ratings": len(dataset.ratings),
            }
        )
        return
    facts = [("Rows", f"{counts.rows:,}")]
    if counts.rows:
        facts += [
            ("Kinds", _counts(counts.kinds)),
            ("Origins", _counts(counts.origins)),
            ("Sources", _counts(counts.sources)),
            ("Added", f"{counts.first_added} to {counts.last_added}"),
            ("Training", f"{plural(len(dataset.pairs), 'pair')}, {plural(len(dataset.ratings), 'single rating')}"),
        ]
    show_facts(facts)


@command.command("export")
@log_profile
@click.option("--out", metavar="FILE", help="Write to a file, which is replaced, instead of stdout.")
@json_option
@click.pass_obj
def export(app: App, profile: str, out: str | None) -> None:
    """Write the log of a profile as JSON lines that TRL trains on.

    `feedback import` reads them back without loss. With --json and without --out: the rows in one document.
    """
    with FeedbackLog(app.home) as log:
        if out is not None:
            lines = [to_line(row).encode(errors="surrogatepass") for row in log.rows(profile)]
            write_atomic(Path(out).absolute(), b"".join(lines))
            if app.json:
                emit_json({"profile": profile, "rows": len(lines), "out": out})
            else:
                say(f"{plural(len(lines), 'row')} of {profile} in {one_line(out)}")
        elif app.json:
            emit_json({"profile": profile, "rows": [to_trl(row) for row in log.rows(profile)]})
        else:
            stdout = sys.stdout.buffer
            for row in log.rows(profile):
                stdout.write(to_line(row).encode(errors="surrogatepass"))
            stdout.flush()


@command.command("forget")
@click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, show_default=False, help="Forget everything of the profile.")
@click.option("--matching", metavar="TEXT", help="Forget the rows with this text in them, upper or lower case.")
@click.option("--yes", "-y", is_flag=True, show_default=False, help="Do not ask.")
@log_profile
@json_option
@click.pass_obj
def forget(app: App, ids: tuple[int, ...], everything: bool, matching: str | None, yes: bool, profile: str) -> None:
    """Delete logged verdicts for good: by ID (see `feedback list`), by text, or all.

    Profiles learnt from them stay as they are; `edge-align personalize` learns anew from what is left.
    """
    if sum((bool(ids), everything, matching is not None)) != 1:
        raise InputError("say what to forget: row ids, --matching TEXT, or --all")
    what = "all feedback" if everything else plural(len(ids), "row") if ids else "all rows with this text"
    confirm(f"Delete {what} of profile {check_name('profile', profile)} for good?", yes=yes)
    with FeedbackLog(app.home) as log:
        forgotten = log.forget(profile, ids=ids, matching=matching, everything=everything)
        if ids and not forgotten:
            raise InputError(f"{profile} has no row with such an id; `edge-align feedback list` shows the ids")
        rows = log.count(profile)
    with AnswerStore(app.home, keep_days=0) as answers:  # what the server remembers could bring a verdict back
        answers.forget(profile=profile)
    if app.json:
        emit_json({"profile": profile, "forgotten": forgotten, "rows": rows})
    else:
        write(f"{plural(forgotten, 'row')} forgotten; {rows:,} left.\n")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
