"""The application: its parts put together, and every error in the shape of the protocol it was caused in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from edge_align import __version__
from edge_align.bases import DEFAULT_BASE, KNOWN
from edge_align.config import RuntimeConfig, ServerConfig
from edge_align.errors import EdgeAlignError
from edge_align.files import check_name
from edge_align.home import Home
from edge_align.server import embeddings, local_api, ollama_api, openai_api, responses_api
from edge_align.server.decoder import Decoder
from edge_align.server.engine import Engine, opener
from edge_align.server.guard import Guard
from edge_align.server.keys import check_reach, Keys
from edge_align.server.learner import Learner
from edge_align.server.ledger import Ledger
from edge_align.server.openapi import refusals
from edge_align.server.refusal import from_error, is_ollama, Refusal
from edge_align.server.service import Service
from edge_align.server.transport import Json

_WORDS = {404: "no such route; docs/server.md lists them", 405: "this method is not served here"}


def create_app(
    *,
    home: Home,
    model: str | None = None,
    config: ServerConfig | None = None,
    runtime: RuntimeConfig | None = None,
    keys: Keys | None = None,
    open_engine: Callable[[], Engine] | None = None,
) -> Guard:
    """The server as an ASGI application; the base is loaded by its own thread once it starts.

    open_engine: instead of `model` in llama.cpp. Raises InputError for an address others can reach without keys.
    """
    config, keys = config or ServerConfig(), keys or Keys()
    check_reach(config.host, keys)
    if config.profile is not None:
        check_name("profile", config.profile)
    runtime = replace(runtime or RuntimeConfig(), n_rows=config.slots)
    decoder = Decoder(open_engine or opener(home, model, runtime), config)
    service = Service(
        config=config,
        keys=keys,
        home=home,
        model_id=model_name(model),
        decoder=decoder,
        ledger=Ledger(home, config),
        learner=Learner(home, model, config),
    )
    service.learner.on_refit = lambda: service.metrics.count("refits")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        decoder.start()
        try:
            yield
        finally:
            await service.learner.close()
            decoder.close()
            service.ledger.close()

    app = _App(
        title="edge-align",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(EdgeAlignError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    for part in (openai_api, responses_api, embeddings, ollama_api, local_api):
        app.include_router(part.router, responses=refusals(ollama=part is ollama_api))
    return Guard(app, config=config, keys=keys)


class _App(FastAPI):
    """Its document is without the 422 that FastAPI adds to routes with parameters: ours refuse with 400."""

    def openapi(self) -> dict[str, Any]:
        found = super().openapi()
        for path in found["paths"].values():
            for route in path.values():
                route["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found.get("components", {}).get("schemas", {}).pop(name, None)
        return found


def model_name(model: str | None) -> str:
    """The id under which the base is served."""
    return model if model in KNOWN else DEFAULT_BASE if model is None else Path(model).stem


async def _refused(request: Request, error: Exception) -> Response:
    refusal = from_error(error)
    return Json(refusal.body(ollama=is_ollama(request.url.path)), refusal.status, refusal.headers)


async def _http_error(request: Request, error: Any) -> Response:
    words = _WORDS.get(error.status_code, "the request cannot be answered")
    return await _refused(request, Refusal(error.status_code, words))
