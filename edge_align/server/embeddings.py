"""Embeddings: the mean of a text's hidden states two thirds up the base, of length 1. They belong to no profile."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_align.config import ServerConfig
from edge_align.server import asks, fields, openapi
from edge_align.server.engine import Engine
from edge_align.server.openapi import takes
from edge_align.server.refusal import bad, Refusal
from edge_align.server.service import Service
from edge_align.server.transport import body_of, Json, service_of

router = APIRouter(prefix="/v1")

Input = str | tuple[int, ...]


def texts_of(value: object, config: ServerConfig) -> list[Input]:
    """The input: a text, token ids, or a list of either. Raises Refusal."""
    given: Sequence[Any] = value if isinstance(value, list) and not asks.is_tokens(value) else [value]
    if not 0 < len(given) <= config.inputs:
        raise bad(f"input must hold 1 to {config.inputs} texts", param="input")
    found: list[Input] = []
    for one in given:
        if isinstance(one, list) and asks.is_tokens(one):
            found.append(tuple(one))
        elif isinstance(one, str):
            found.append(asks.usable(one, "input"))
        else:
            raise bad("input must be text, token ids, or a list of them", param="input")
    return found


async def embed(service: Service, texts: Sequence[Input]) -> tuple[list[list[float]], int]:
    """(one vector per text, tokens read), each text between two slices of answers."""
    vectors, count = [], 0
    for text in texts:

        def one(engine: Engine, text: Input = text) -> tuple[list[float], int]:
            if engine.embed is None:
                raise Refusal(400, "this engine makes no embeddings", code="unsupported_value")
            tokens = [*text] if isinstance(text, tuple) else engine.backend.tokenize(text)
            if not all(0 <= token < engine.backend.info.n_vocab for token in tokens):
                raise bad("a token id lies outside the vocabulary; send texts", param="input")
            if len(tokens) > engine.backend.info.n_ctx:
                raise bad(f"a text is longer than {engine.backend.info.n_ctx} tokens; split it", param="input")
            return [float(x) for x in engine.embed(tokens or [0])], len(tokens)

        vector, used = await service.decoder.call(one)
        vectors.append(vector)
        count += used
    return vectors, count


@router.post("/embeddings", **takes(openapi.EMBEDDINGS))
async def embeddings(request: Request) -> Response:
    service, body = service_of(request), body_of(request)
    form = fields.choice(body, "encoding_format", ("float", "base64")) or "float"
    name = fields.text(body, "model", most=256) or service.model_id
    if name.split("@")[0] != service.model_id:
        raise Refusal(404, "no such model; GET /v1/models lists them", code="model_not_found", param="model")
    vectors, count = await embed(service, texts_of(body.get("input"), service.config))
    size = fields.integer(body, "dimensions", 1, 1 << 20)
    if size is not None and size != len(vectors[0]):
        raise bad(f"dimensions must be {len(vectors[0])} here; leave it out", param="dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": packed(vector) if form == "base64" else vector}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "data": data, "model": service.model_id, "usage": usage})


def packed(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
