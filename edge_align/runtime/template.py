"""The chat template of a GGUF, rendered in a sandbox, and texts of the user kept from posing as control tokens."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import meta
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_align.errors import InputError, ModelLoadError
from edge_align.records import Prompt, Tools

SOURCE_LIMIT = 64 * 1024  # characters of a template
GROWTH_LIMIT = 1 << 20  # characters that a template may add to the conversation
STEP_LIMIT = 100_000  # numbers that all calls of range() together may give
TIME_LIMIT_SEC = 5.0
NO_TOOLS = "this model's chat template has no tools; leave out tools and messages of role tool"

CHATML_START = "<|im_start|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For a model without a template that has ChatML's tokens."""

PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% else %}"
    "{{ ('Question' if message['role'] == 'user' else 'Answer') + ':\n' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)
"""For a model without either, which was never taught to take turns: its answers end with their line (decision 0014)."""


def fallback(has_chatml: bool) -> str:
    """The template of a model that has none."""
    return CHATML if has_chatml else PLAIN


def ends_line(piece: bytes) -> bool:
    """Does a token end an answer in PLAIN?"""
    return b"\n" in piece


class _Environment(ImmutableSandboxedEnvironment):
    """No attribute tricks (the sandbox), and no operator that makes a huge value out of small ones."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(side, int | float) and abs(side) < 1e6 for side in (left, right))
        if operator == "**" or not numbers:
            raise SecurityError(f"the operator {operator} is not available here")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template. `takes_tools`: does it read a list of tools?

    Raises ModelLoadError when it is too long or is not a template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > SOURCE_LIMIT:
            raise ModelLoadError(f"the model's chat template is longer than {SOURCE_LIMIT} characters")
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_refuse, strftime_now=time.strftime, bos_token=bos_token, eos_token=eos_token
        )
        try:
            parsed = environment.parse(source)
            self.takes_tools = "tools" in meta.find_undeclared_variables(parsed)
            self._template = environment.from_string(parsed)
        except (TemplateError, RecursionError) as error:
            raise ModelLoadError(f"the model's chat template is broken: {_one_line(error)}") from error

    def render(
        self, messages: list[dict[str, str]], *, tools: Sequence[Any] = (), add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text.

        Raises InputError when the template refuses it, passes its bounds, or has no tools where there are some.
        """
        if (tools or any(message["role"] == "tool" for message in messages)) and not self.takes_tools:
            raise InputError(NO_TOOLS)
        limit = GROWTH_LIMIT + 4 * sum(len(message["content"]) for message in messages)
        deadline = time.monotonic() + TIME_LIMIT_SEC
        given = {"tools": [*tools]} if tools else {}
        parts, size = [], 0
        try:
            for part in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, range=_budgeted_range(), **given
            ):
                parts.append(part)
                size += len(part)
                if size > limit or time.monotonic() > deadline:
                    raise SecurityError("it writes too much or takes too long")
        except _Refused as error:
            raise InputError(f"the model's chat template refuses this conversation: {_one_line(error)}") from error
        except Exception as error:  # a template is a program from a file: whatever it raises is its own fault
            raise InputError(f"the model's chat template failed on this conversation: {_one_line(error)}") from error
        return "".join(parts)


def render_segments(
    template: ChatTemplate, prompt: Prompt, control: re.Pattern[str] | None, tools: Tools = ()
) -> list[tuple[str, bool]]:
    """The rendered conversation as (text, special) pieces: control tokens are parsed in special pieces only.

    `control` matches every text that the tokenizer would read as a control token. Such a text inside a message or a
    tool is replaced by a unique mark before rendering and comes back as a piece of plain text. A conversation without
    any (None, or no match) is one special piece: exactly the template's own rendering.
    """
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    texts = [message["content"] for message in messages] + [*_texts(tools)]
    if control is None or not any(map(control.search, texts)):
        return [(template.render(messages, tools=tools), True)]
    mark = _unused_mark(texts)
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"{mark}{len(hidden) - 1}{mark[0]}"

    for message in messages:
        message["content"] = control.sub(hide, message["content"])
    hiding = _mapped(tools, lambda text: control.sub(hide, text))
    pieces = re.split(f"{mark}([0-9]+){mark[0]}", template.render(messages, tools=hiding))
    return [(hidden[int(text)], False) if i % 2 else (text, True) for i, text in enumerate(pieces) if text]


def render_tokens(
    template: ChatTemplate,
    prompt: Prompt,
    tools: Tools = (),
    *,
    tokenize: Callable[..., list[int]],
    control: Callable[[], re.Pattern[str] | None],
    bos: int | None,
) -> list[int]:
    """Token ids of a conversation; texts of messages and tools never become control tokens.

    `bos`: to begin with, if not None.

    `tokenize(text, special=...)` as in the Backend protocol; `control()` as in `render_segments`, asked when needed.
    """
    texts = [*(message.content for message in prompt), *_texts(tools)]
    suspicious = any(tokenize(text, special=True) != tokenize(text, special=False) for text in texts)
    segments = render_segments(template, prompt, control() if suspicious else None, tools)
    tokens = [token for text, special in segments for token in tokenize(text, special=special)]
    return [bos, *tokens] if bos is not None and tokens[:1] != [bos] else tokens


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, the names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` made to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(one, change) for name, one in value.items()}
    return [_mapped(one, change) for one in value] if isinstance(value, list | tuple) else value


def _unused_mark(texts: list[str]) -> str:
    """Private-use characters that occur in none of `texts`."""
    length = 2
    while any("\ue0ea" * length in text for text in texts):
        length += 1
    return "\ue0ea" * length


class _Refused(TemplateError):
    """The template called raise_exception."""


def _refuse(message: str) -> None:
    raise _Refused(str(message))


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _budgeted_range() -> Any:
    left = STEP_LIMIT

    def limited(*bounds: int) -> Iterator[int] | range:
        nonlocal left
        numbers = range(*bounds)
        left -= len(numbers)
        if left < 0:
            raise SecurityError("range() gives too many numbers")
        return numbers

    return limited


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
