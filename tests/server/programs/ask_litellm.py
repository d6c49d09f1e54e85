"""litellm against a live server: ask_litellm.py URL KEY MODEL MODE; prints what it found as JSON."""

import json
import sys
import time

import litellm

url, key, model, mode = sys.argv[1:]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def ask(text="Hi", **more):
    given = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": key, "max_retries": 0, "temperature": 0}
    return litellm.completion(**{**given, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **more})


def error(**more):
    try:
        ask(**more)
    except Exception as raised:
        return [type(raised).__name__, getattr(raised, "status_code", None)]
    return ["", 200]


def everything():
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    counted = list(ask(stream=True, stream_options={"include_usage": True}))
    embedded = litellm.embedding(model=f"openai/{model}", input=["a"], api_base=f"{url}/v1", api_key=key)
    return {
        "whole": ask().choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)),
        "usage": counted[-1].usage.completion_tokens,
        "shaped": json.loads(ask(response_format=form, max_tokens=40).choices[0].message.content),
        "embedded": len(embedded.data[0]["embedding"]),
        "errors": [
            error(temperature=-1),
            error(api_key="wrong"),
            error(model="openai/no-such-model"),
            error(text="x" * (1 << 20)),
        ],
    }


def refused():
    errors = [error(), error()]
    started = time.monotonic()
    ask(max_retries=2)
    return {"errors": errors, "waited": time.monotonic() - started}


def gone():
    stream = ask(stream=True, max_tokens=3000)
    next(iter(stream))
    del stream
    return {}


print(json.dumps({"everything": everything, "refused": refused, "gone": gone}[mode]()))
