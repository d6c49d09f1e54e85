"""A conversation with commands: what was said, the last answer, and what each verdict becomes in the log."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TYPE_CHECKING

from edge_align.cli.output import one_line, say, stages, write
from edge_align.cli.report import summary
from edge_align.config import check_strength, SamplingConfig
from edge_align.errors import EdgeAlignError, InputError, SessionClosed
from edge_align.records import check_text, join_chunks, Message, Origin, Prompt

if TYPE_CHECKING:
    from edge_align.assistant import Assistant
    from edge_align.home import Home

HELP = """\
/up               the last answer is good (after /retry: better than the one before)
/down             the last answer is bad (after /retry: worse than the one before)
/edit [TEXT]      the last answer as it should have been; without TEXT, in $EDITOR
/retry            another answer to the same question
/learn            learn from what was said, and go on with the new profile
/profile [NAME]   show the profiles, or change to one; `off` is the base
/strength [X]     show or set how far to steer; 1 is as calibrated, 0 the base
/new              forget this conversation and begin another
/quit             end (so does Ctrl-D); Ctrl-C stops an answer
A line that begins with a space is sent as it is."""

SEEDS = 2**32


@dataclass(frozen=True, slots=True)
class Turn:
    """The last answer, and the one it replaced when it is a retry."""

    prompt: Prompt
    text: str
    earlier: str | None = None
    verdict: str | None = None


class Conversation:
    """Reads lines, answers questions, and logs verdicts. `run` returns when the person is done."""

    def __init__(
        self,
        assistant: Assistant,
        *,
        home: Home,
        sampling: SamplingConfig,
        strength: float,
        system: str | None,
        answers_on_stderr: bool,
        stoppable: Callable[[], AbstractContextManager[Callable[[], bool]]],
    ) -> None:
        self._assistant = assistant
        self._home = home
        self._sampling = sampling
        self._strength = strength
        if system is not None:
            check_text("system prompt", system)
        self._opening = (Message("system", system),) if system is not None else ()
        self._messages: Prompt = self._opening
        self._turn: Turn | None = None
        self._answers = 0
        self._verdicts = {"up": 0, "down": 0, "edit": 0, "retry": 0}
        self._reports: list[dict[str, Any]] = []
        self._answers_on_stderr = answers_on_stderr
        self._stoppable = stoppable
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _rest: say(HELP),
            "up": lambda _rest: self._rate(True),
            "down": lambda _rest: self._rate(False),
            "edit": self._edit,
            "retry": lambda _rest: self._retry(),
            "learn": lambda _rest: self._learn(),
            "profile": self._profile,
            "strength": self._set_strength,
            "new": lambda _rest: self._begin_again(),
        }

    def run(self, read: Callable[[], str | None]) -> None:
        """Answer line by line until /quit or the end; what goes wrong with one line does not end the conversation."""
        while (line := read()) is not None:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    name, _, rest = line[1:].strip().partition(" ")
                    self._command(name.lower())(rest.strip())
                elif line.strip():
                    self._ask(line.strip())
            except SessionClosed:
                raise
            except EdgeAlignError as error:
                say(f"Error: {one_line(str(error))}")

    def where(self) -> str:
        """Base, profile and strength in words."""
        profile = self._assistant.profile
        if profile is None:
            return f"{self._assistant.base.id} without a profile"
        return f"{self._assistant.base.id} with profile {profile.name} version {profile.version}" + (
            "" if self._strength == 1.0 else f" at strength {self._strength:g}"
        )

    def document(self) -> dict[str, Any]:
        """The whole conversation for --json."""
        profile = self._assistant.profile
        return {
            "model": self._assistant.base.id,
            "profile": profile.name if profile else None,
            "version": profile.version if profile else None,
            "strength": self._strength if profile else 0.0,
            "messages": [{"role": message.role, "content": message.content} for message in self._messages],
            "verdicts": self._verdicts,
            "reports": self._reports,
        }

    def _command(self, name: str) -> Callable[[str], None]:
        if name not in self._commands:
            raise InputError(f"unknown command /{name}; /help lists them, and a leading space sends the line")
        return self._commands[name]

    def _ask(self, text: str) -> None:
        check_text("prompt", text)
        prompt = (*self._messages, Message("user", text))
        answer = self._answer(prompt)
        self._turn = Turn(prompt, answer)
        self._messages = (*prompt, Message("assistant", answer))

    def _answer(self, prompt: Prompt) -> str:
        """Stream an answer with the next seed."""
        sampling = replace(self._sampling, seed=(self._sampling.seed + self._answers) % SEEDS)
        self._answers += 1
        with self._stoppable() as stopped:
            chunks = []
            for chunk in self._assistant.stream(prompt, sampling=sampling, strength=self._strength, cancelled=stopped):
                write(chunk.text, err=self._answers_on_stderr)
                chunks.append(chunk)
        write("\n", err=self._answers_on_stderr)
        answer = join_chunks(chunks)
        if answer.finish_reason == "cancelled":
            say("(stopped)")
        return answer.text

    def _last(self) -> Turn:
        if self._turn is None:
            raise InputError("there is no answer yet; ask something first")
        return self._turn

    def _replace(self, turn: Turn) -> None:
        self._turn = turn
        self._messages = (*turn.prompt, Message("assistant", turn.text))

    def _rate(self, up: bool) -> None:
        turn = self._last()
        verdict = "up" if up else "down"
        if turn.verdict == verdict:
            say(f"/{verdict} is in the log already.")
            return
        if turn.earlier is not None and turn.earlier != turn.text:
            chosen, rejected = (turn.text, turn.earlier) if up else (turn.earlier, turn.text)
            self._prefer(turn, chosen=chosen, rejected=rejected, origin="retry")
            self._verdicts["retry"] += 1
            say("Logged: " + ("better than the answer before." if up else "worse than the answer before."))
        else:
            self._assistant.rate(turn.prompt, turn.text, up)
            self._verdicts[verdict] += 1
            say("Logged: good." if up else "Logged: bad.")
        self._turn = replace(turn, verdict=verdict)

    def _prefer(self, turn: Turn, *, chosen: str, rejected: str, origin: Origin) -> None:
        self._assistant.prefer(turn.prompt, chosen, rejected, origin=origin)

    def _edit(self, text: str) -> None:
        turn = self._last()
        if not text:
            import click

            try:
                text = (click.edit(turn.text) or "").strip()
            except click.ClickException as error:
                raise InputError(f"{error.format_message()}; set EDITOR, or type /edit TEXT") from None
        if not text or text == turn.text.strip():
            say("Nothing changed, nothing logged.")
            return
        self._prefer(turn, chosen=text, rejected=turn.text, origin="edit")
        self._verdicts["edit"] += 1
        self._replace(Turn(turn.prompt, text))
        say("Logged: your version is preferred.")

    def _retry(self) -> None:
        turn = self._last()
        self._replace(Turn(turn.prompt, self._answer(turn.prompt), earlier=turn.text))

    def _learn(self) -> None:
        with stages() as progress:
            report = self._assistant.learn(progress=progress).to_dict()
        self._reports.append(report)
        say(summary(report))

    def _profile(self, name: str) -> None:
        if name:
            self._assistant.set_profile(None if name == "off" else name)
        else:
            from edge_align.profiles import ProfileStore

            names = ProfileStore(self._home).names()
            say("Profiles: " + (", ".join(names) or "none yet; /learn makes one"))
        say(f"Now: {self.where()}.")

    def _set_strength(self, text: str) -> None:
        if text:
            try:
                strength = float(text)
            except ValueError:
                raise InputError(f"{text!r} is not a number; try /strength 0.5") from None
            check_strength(strength)
            self._strength = strength
        say(f"Strength {self._strength:g}.")

    def _begin_again(self) -> None:
        self._messages, self._turn = self._opening, None
        say("A new conversation.")
