"""Requests of every protocol, as one kind of value: what is asked, how it is sampled, whose taste is wanted."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_align.config import SamplingConfig, ServerConfig, STRENGTH_LIMIT
from edge_align.errors import InputError
from edge_align.feedback.fields import brief
from edge_align.records import check_text, Message, Prompt, Tools, user_prompt
from edge_align.server import fields
from edge_align.server import tools as tool_calls
from edge_align.server.fields import Body
from edge_align.server.refusal import bad

SEEDS = 2**32
REPEATS = re.compile(r"\{\s*(\d+)\s*,?\s*(\d*)\s*\}")
MOST_REPEATS = 256  # of an item in a schema; a grammar spells every repetition out
SCHEMA_SIZES = ("minItems", "maxItems", "minLength", "maxLength")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which profile a request names in its body or headers, before anything is looked up."""

    profile: str | None = None
    strength: float | None = None
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for answers. `tokens` or `text` (not templated) stand for prompts of /v1/completions."""

    model: str | None
    sampling: SamplingConfig
    prompt: Prompt = ()
    text: str | None = None
    tokens: tuple[int, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    wanted: Wanted = field(default_factory=Wanted)
    schema: str | None = None  # JSON schema of the answer
    tools: Tools = ()
    forced: bool = False  # a call of one of the tools, and nothing else

    @property
    def conversation(self) -> Prompt:
        """What is kept as the question of a verdict; empty where there are only token ids."""
        return self.prompt or (user_prompt(self.text) if self.text else ())

    def judged(self, text: str) -> bool:
        """Can a verdict on the answer `text` be learnt from? Not on a call, nor on what is said of its result."""
        called = self.forced or (self.tools and tool_calls.BEGIN in text)
        called = called or any(message.role == "tool" for message in self.prompt)
        return bool(self.conversation and text.strip() and not called)


def chat(body: Body, config: ServerConfig) -> Ask:
    """/v1/chat/completions. Unknown fields are ignored. Raises Refusal."""
    tools = tool_calls.offered(body, config)
    if body.get("modalities") not in (None, ["text"]) or body.get("audio") is not None:
        raise bad("only text can be answered; leave out modalities and audio", param="modalities")
    sampling = sampled(body, config)
    if fields.flag(body, "logprobs"):
        sampling = replace(sampling, top_logprobs=fields.integer(body, "top_logprobs", 0, 20) or 0)
    elif body.get("top_logprobs") is not None:
        raise bad("top_logprobs needs logprobs: true", param="top_logprobs")
    schema = response_schema(body, config)
    ask = common(body, config, sampling, prompt=messages(body, config), schema=schema)
    return with_tools(ask, body, tools, config)


def with_tools(ask: Ask, body: Body, tools: Tools, config: ServerConfig) -> Ask:
    """The request with its tools, and with the schema of a call where `tool_choice` demands one. Raises Refusal."""
    call = tool_calls.forced(body, tools)
    if call is None:
        return replace(ask, tools=tools)
    if ask.schema is not None:
        raise bad("a form of the answer and a demanded tool_choice cannot both hold; send one", param="tool_choice")
    return replace(ask, tools=tools, schema=checked_schema(json.loads(call), config), forced=True)


def completions(body: Body, config: ServerConfig) -> list[Ask]:
    """/v1/completions: one Ask per prompt. Raises Refusal."""
    for name in ("echo", "suffix"):
        if body.get(name):
            raise bad(f"{name} is not supported; leave it out", param=name)
    sampling = sampled(body, config)
    legacy = fields.integer(body, "logprobs", 0, 5)
    if legacy is not None:
        sampling = replace(sampling, top_logprobs=legacy)
    given = body.get("prompt", "")
    prompts: Sequence[Any] = given if isinstance(given, list) and not is_tokens(given) else [given]
    if not 0 < len(prompts) <= config.n:
        raise bad(f"prompt must be text, token ids, or a list of 1 to {config.n} of them", param="prompt")
    asks = []
    for prompt in prompts:
        if isinstance(prompt, str) and prompt:
            asks.append(common(body, config, sampling, text=usable(prompt, "prompt")))
        elif isinstance(prompt, list) and is_tokens(prompt):
            asks.append(common(body, config, sampling, tokens=tuple(prompt)))
        else:
            raise bad("prompt is empty or neither text nor token ids", param="prompt")
    if len(asks) * asks[0].n > config.n:
        raise bad(f"prompts times n is more than {config.n}", param="n")
    return asks


def is_tokens(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def common(
    body: Body,
    config: ServerConfig,
    sampling: SamplingConfig,
    *,
    prompt: Prompt = (),
    text: str | None = None,
    tokens: tuple[int, ...] = (),
    schema: str | None = None,
) -> Ask:
    options = fields.table(body, "stream_options") or {}
    return Ask(
        model=fields.text(body, "model", most=256),
        sampling=sampling,
        prompt=prompt,
        text=text,
        tokens=tokens,
        n=fields.integer(body, "n", 1, config.n) or 1,
        stream=fields.flag(body, "stream"),
        include_usage=fields.flag(options, "include_usage"),
        wanted=wanted(body),
        schema=schema,
    )


def wanted(body: Body) -> Wanted:
    """The `steering` field: a profile by name, a strength, or nothing at all."""
    given = fields.table(body, "steering") or {}
    return Wanted(
        profile=fields.text(given, "profile", most=64),
        strength=fields.number(given, "strength", -STRENGTH_LIMIT, STRENGTH_LIMIT),
        enabled=fields.flag(given, "enabled", default=True),
    )


def sampled(body: Body, config: ServerConfig) -> SamplingConfig:
    """The sampling fields; what is left out is as in SamplingConfig, and the seed is drawn."""
    limits = [fields.integer(body, name, 1, 1_000_000) for name in ("max_tokens", "max_completion_tokens")]
    seed = fields.integer(body, "seed", -(2**63), 2**64)
    values: dict[str, Any] = {
        "temperature": fields.number(body, "temperature", 0.0, 10.0),
        "top_p": fields.number(body, "top_p", 0.0, 1.0),
        "top_k": fields.integer(body, "top_k", 1, 1_000_000),
        "presence_penalty": fields.number(body, "presence_penalty", -2.0, 2.0),
        "frequency_penalty": fields.number(body, "frequency_penalty", -2.0, 2.0),
    }
    return sampling_config(
        {name: value for name, value in values.items() if value is not None},
        max_tokens=min([config.max_tokens, *(limit for limit in limits if limit is not None)]),
        seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
        stop=stops(body.get("stop")),
        logit_bias=logit_bias(body),
    )


def sampling_config(values: dict[str, Any], **more: Any) -> SamplingConfig:
    try:
        return SamplingConfig(**values, **more)
    except InputError as error:
        raise bad(str(error)) from None


def stops(value: object) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise bad("stop must be text or a list of texts", param="stop")
    return tuple(one for one in given if one)


def logit_bias(body: Body) -> tuple[tuple[int, float], ...]:
    given = fields.table(body, "logit_bias") or {}
    found = []
    for token, bias in given.items():
        if not re.fullmatch(r"[0-9]{1,9}", token) or not isinstance(bias, int | float) or isinstance(bias, bool):
            raise bad("logit_bias must map token ids to numbers between -100 and 100", param="logit_bias")
        found.append((int(token), float(min(max(bias, -1e3), 1e3))))
    return tuple(found)


def messages(body: Body, config: ServerConfig) -> Prompt:
    """The conversation. `developer` is `system`; what has no text is refused."""
    given = fields.items(body, "messages", most=config.messages)
    if not given:
        raise bad("messages is missing or empty; send at least one message of role user", param="messages")
    turns = tuple(message(one, f"messages[{i}]") for i, one in enumerate(given))
    if turns[-1].role == "assistant":
        raise bad("the last message is the assistant's; end with a message of role user", param="messages")
    return turns


def message(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise bad(f"{name} is not an object with role and content", param="messages")
    role: Any = "system" if value.get("role") == "developer" else value.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise bad(f"{name} has role {brief(role)}; use system, user, assistant or tool", param="messages")
    if role == "assistant" and value.get("tool_calls"):
        said = content(value["content"], name) if value.get("content") else ""
        calls = tool_calls.written(value["tool_calls"], name)
        return Message(role, usable(f"{said}\n{calls}" if said else calls, name))
    return Message(role, usable(content(value.get("content"), name), name))


def content(value: object, name: str) -> str:
    """Text, or the text of a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(f"{name} has no text content", param="messages")
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise bad(f"{name} holds something other than text; this model reads text alone", param="messages")
        parts.append(part["text"])
    return "".join(parts)


def usable(text: str, name: str) -> str:
    try:
        check_text(name, text)
    except InputError as error:
        raise bad(f"{error}; send some text", param=name.split("[")[0]) from None
    return text


def response_schema(body: Body, config: ServerConfig) -> str | None:
    """The JSON schema that `response_format` asks for; None for plain text."""
    given = fields.table(body, "response_format") or {}
    kind = fields.choice(given, "type", ("text", "json_object", "json_schema"))
    if kind in (None, "text"):
        return None
    schema: object = given.get("schema")
    if kind == "json_schema":
        schema = (fields.table(given, "json_schema") or {}).get("schema", schema)
        if schema is None:
            raise bad("response_format.json_schema.schema is missing", param="response_format")
    return checked_schema({"type": "object"} if schema is None else schema, config)


def checked_schema(schema: object, config: ServerConfig) -> str:
    """A schema as text, refused where its grammar would be huge. Raises Refusal."""
    if not isinstance(schema, dict):
        raise bad("the schema must be an object", param="response_format")
    written = json.dumps(schema)
    if len(written) > config.schema_bytes:
        raise bad(f"the schema is larger than {config.schema_bytes} bytes", param="response_format")
    pending: list[object] = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            sizes = [value.get(name, 0) for name in SCHEMA_SIZES]
            pattern = value.get("pattern", "")
            repeats = [
                int(n) for pair in REPEATS.findall(pattern if isinstance(pattern, str) else "") for n in pair if n
            ]
            sizes += [n for n in repeats if n > MOST_REPEATS]
            if any(isinstance(n, int | float) and n > MOST_REPEATS for n in sizes) or len(repeats) > 8:
                raise bad(f"the schema repeats something more than {MOST_REPEATS} times", param="response_format")
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return written
