"""Tools of a chat: the functions that a request offers, and the calls in an answer.

A call is what most open models are trained to write: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_align.config import ServerConfig
from edge_align.records import Tools
from edge_align.server import fields
from edge_align.server.fields import Body
from edge_align.server.refusal import bad

BEGIN, END = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Call:
    """One function to be called. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


def offered(body: Body, config: ServerConfig) -> Tools:
    """The functions that a request offers; none where it forbids their use. Raises Refusal."""
    if body.get("functions"):
        raise bad("functions is the older form; send tools", param="functions")
    given = fields.items(body, "tools", most=config.tools) or []
    found = tuple(described(one, f"tools[{i}]") for i, one in enumerate(given))
    if len(json.dumps(found)) > config.tools_bytes:
        raise bad(f"tools is larger than {config.tools_bytes} bytes; offer fewer or shorter ones", param="tools")
    return () if body.get("tool_choice") == "none" else found


def forced(body: Body, tools: Tools) -> str | None:
    """The JSON schema of a call of one of the functions that `tool_choice` demands; None where it demands none.

    Raises Refusal.
    """
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    wanted = names(tools)
    if isinstance(choice, dict):
        wanted = [str((fields.table(choice, "function") or {}).get("name"))]
    elif choice != "required":
        raise bad('tool_choice must be "auto", "none", "required" or name a function', param="tool_choice")
    shown = [tool["function"] for tool in tools if tool["function"]["name"] in wanted]
    if not shown:
        raise bad("tool_choice asks for a function that tools does not offer", param="tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in shown
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def described(value: object, name: str) -> dict[str, Any]:
    """A tool with what templates read of it. Raises Refusal for one that is no function."""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise bad(f'{name} must be {{"type": "function", "function": {{"name": ...}}}}', param="tools")
    called = fields.text(function, "name", most=64)
    if called is None or not NAME.fullmatch(called):
        raise bad(f"{name} needs a name of letters, digits, '_', '-' and '.'", param="tools")
    shown = {
        "name": called,
        "description": fields.text(function, "description") or "",
        "parameters": fields.table(function, "parameters") or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": shown}


def written(calls: object, name: str) -> str:
    """Calls of an earlier turn as the text that they were read from. Raises Refusal."""
    texts = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(f"{name}.tool_calls must be a list of function calls with names", param="messages")
        arguments = loaded(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise bad(f"{name}.tool_calls has arguments that are no JSON object", param="messages")
        body = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        texts.append(f"{BEGIN}\n{body}\n{END}")
    return "\n".join(texts)


def loaded(value: object) -> object:
    """JSON that may stand in a string; None for a string that is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


@dataclass
class CallReader:
    """Reads an answer as it is decoded: its text is let through, calls of the offered functions are kept back.

    forced: the whole answer is a call, without its marks.
    """

    tools: Tools
    forced: bool = False
    calls: list[Call] = field(default_factory=list)
    _held: str = ""
    _after_call: bool = False  # white space there is no text

    def __post_init__(self) -> None:
        self._held = BEGIN if self.forced else ""

    def feed(self, text: str) -> str:
        """Go on; gives the text that cannot be of a call any more."""
        held, found = self._held + text, []
        while True:
            if self._after_call:
                held = held.lstrip()
                self._after_call = not held
            start = held.find(BEGIN)
            if start < 0:
                start = len(held) - overlap(held, BEGIN)
                end = -1
            else:
                end = held.find(END, start)
            found.append(held[:start])
            held = held[start:]
            if end < 0:
                break
            body, rest = held[: end - start + len(END)], held[end - start + len(END) :]
            if not self._took(body):
                found.append(body)
            held = rest
        self._held = held
        return "".join(found)

    def finish(self) -> str:
        """The end: a call whose last mark is missing is one; anything else that was kept back is text."""
        rest, self._held = self._held, ""
        if rest.startswith(BEGIN) and self._took(rest):
            return ""
        return rest.removeprefix(BEGIN) if self.forced else rest

    def _took(self, body: str) -> bool:
        """Is it a call? It is then among `calls`."""
        value = loaded(body.removeprefix(BEGIN).removesuffix(END))
        name = value.get("name") if isinstance(value, dict) else None
        arguments = loaded(value.get("arguments") or {}) if isinstance(value, dict) else None
        if not isinstance(arguments, dict) or not isinstance(name, str) or name not in names(self.tools):
            return False
        self.calls.append(Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False)))
        self._after_call = True
        return True


def read(text: str, tools: Tools, *, forced: bool) -> tuple[str, list[Call]]:
    """A whole answer, by `CallReader`: what of it is text, and the calls."""
    reader = CallReader(tools, forced)
    return reader.feed(text) + reader.finish(), reader.calls


def names(tools: Tools) -> Sequence[str]:
    return [tool["function"]["name"] for tool in tools]


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return max(n for n in range(len(mark)) if text.endswith(mark[:n]))
