"""langchain-openai against a live server: ask_langchain.py URL KEY MODEL MODE; prints what it found as JSON."""

import json
import sys
import time

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

url, key, model, mode = sys.argv[1:]
SCHEMA = {"title": "answer", "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def chat(**more):
    given = {"model": model, "base_url": f"{url}/v1", "api_key": key, "max_retries": 0, "temperature": 0}
    return ChatOpenAI(**{**given, "max_tokens": 4, **more})


def status(**more):
    try:
        chat(**{name: value for name, value in more.items() if name != "text"}).invoke(more.get("text", "Hi"))
    except Exception as error:
        return [error_name(error), getattr(error, "status_code", None)]
    return ["", 200]


def error_name(error):
    """The class of the SDK beneath, where LangChain made one of its own from it."""
    names = [one.__name__ for one in type(error).__mro__ if one.__module__.startswith("openai")]
    return names[0] if names else type(error).__name__


def everything():
    chunks = list(chat(stream_usage=True).stream("Hi"))
    shaped = chat(max_tokens=40).with_structured_output(SCHEMA, method="json_schema")
    embeddings = OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key=key, check_embedding_ctx_length=False)
    return {
        "whole": chat().invoke("Hi").content,
        "streamed": "".join(str(chunk.content) for chunk in chunks),
        "usage": next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata),
        "uncounted": [c.usage_metadata for c in chat(stream_usage=False).stream("Hi") if c.usage_metadata],
        "shaped": shaped.invoke("Is it?"),
        "embedded": len(embeddings.embed_query("a")),
        "errors": [
            status(temperature=-1),
            status(api_key="wrong"),
            status(model="gpt-5"),
            status(text="x" * (1 << 20)),
        ],
    }


def refused():
    errors = [status(), status()]
    started = time.monotonic()
    chat(max_retries=2).invoke("Hi")
    return {"errors": errors, "waited": time.monotonic() - started}


def gone():
    stream = chat(max_tokens=3000).stream("Hi")
    next(stream)
    stream.close()
    return {}


print(json.dumps({"everything": everything, "refused": refused, "gone": gone}[mode]()))
