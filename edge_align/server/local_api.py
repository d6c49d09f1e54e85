"""The server's own routes: health, properties, metrics, profiles and their versions, control vectors, feedback."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from edge_align import __version__
from edge_align.config import STRENGTH_LIMIT
from edge_align.errors import InputError
from edge_align.server import fields, openapi
from edge_align.server.keys import Caller
from edge_align.server.ledger import PAGE, verdict
from edge_align.server.openapi import answers, takes
from edge_align.server.refusal import bad, Refusal
from edge_align.server.service import FALLBACK_PROFILE, Service
from edge_align.server.transport import body_of, caller_of, Json, service_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    service_of(request).decoder.check()
    return Json({"status": "ok"})


@router.get("/props")
async def props(request: Request) -> Response:
    """What llama-server tells of itself, without paths."""
    service = service_of(request)
    info, tools = await service.decoder.call(lambda engine: (engine.backend.info, engine.backend.takes_tools))
    return Json(
        {
            "default_generation_settings": {"n_ctx": info.n_ctx, "params": {"temperature": 1.0, "top_p": 0.95}},
            "total_slots": service.config.slots,
            "model_alias": service.model_id,
            "chat_template_caps": {"supports_tools": tools},
            "modalities": {"vision": False, "audio": False},
            "build_info": f"edge-align {__version__}, {info.version}",
            "is_sleeping": False,
        }
    )


@router.get("/metrics", **answers("text/plain"))
async def metrics(request: Request) -> Response:
    service = service_of(request)
    running, waiting = service.decoder.load
    gauges = {
        "requests_processing": running,
        "requests_deferred": waiting,
        "prompt_cache_bytes": service.decoder.cache.bytes,
    }
    return PlainTextResponse(service.metrics.exposition(gauges), media_type="text/plain; version=0.0.4")


# -- profiles ----------------------------------------------------------------------------------------------------------
@router.get("/v1/profiles")
async def profiles(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    return Json({"object": "list", "data": [await summary(service, name) for name in service.profiles(caller)]})


@router.get("/v1/profiles/{name}")
async def profile(request: Request, name: str) -> Response:
    """A profile and its history, the oldest version first."""
    service = service_of(request)
    service.check_profile(name, caller_of(request))
    versions = service.store.history(name) if service.store.has(name) else ()
    shown = [
        {
            "version": one.number,
            "active": one.active,
            "created": one.manifest.get("created"),
            "pairs": one.manifest.get("pairs"),
            "ratings": one.manifest.get("ratings"),
            "heldout": one.manifest.get("heldout"),
            "damaged": one.damage is not None,
        }
        for one in versions
    ]
    return Json({**await summary(service, name), "history": shown})


@router.post("/v1/profiles/{name}/undo", **takes(openapi.OBJECT))
async def undo(request: Request, name: str) -> Response:
    """Go back to the version that was active before."""
    service = service_of(request)
    service.check_profile(name, caller_of(request))
    try:
        service.store.undo(name)
    except InputError:
        raise Refusal(409, "this profile has no earlier version to go back to", code="no_earlier_version") from None
    return Json(await summary(service, name))


@router.post("/v1/profiles/{name}/learn", status_code=202, **takes(openapi.OBJECT))
async def learn(request: Request, name: str) -> Response:
    """Refit now, whatever is new; GET /v1/profiles/NAME tells how it went."""
    service = service_of(request)
    service.check_profile(name, caller_of(request))
    if service.config.learn == "off":
        raise Refusal(409, "learning is off; start the server with --learn auto or manual", code="learning_off")
    service.learner.want(name)
    return Json(await summary(service, name), status_code=202)


async def summary(service: Service, name: str) -> dict[str, Any]:
    active = service.store.active_version(name) if service.store.has(name) else None
    report = service.learner.reports.get(name, {})
    return {
        "id": name,
        "object": "profile",
        "active_version": active,
        "feedback_rows": await service.ledger.count(name),
        "learning": service.learner.state(name),
        "last_refit": {key: report.get(key) for key in ("state", "version", "activated", "reason")} if report else None,
    }


# -- control vectors, in the shape of llama.cpp's open proposal, which is that of /lora-adapters -----------------------
@router.get("/cvectors")
async def cvectors(request: Request) -> Response:
    return Json(vectors(service_of(request), caller_of(request)))


@router.post("/cvectors", **takes(openapi.CVECTORS))
async def set_cvectors(request: Request) -> Response:
    """{"cvectors": [{"id", "scale"}]}: the profile that requests get when they name none; those left out get 0."""
    service, caller = service_of(request), caller_of(request)
    if caller.bound:
        raise Refusal(403, "this API key is bound to its profiles and cannot change the default", code="forbidden")
    names = service.profiles(caller)
    given = fields.items(body_of(request), "cvectors", most=1000)
    if given is None:
        raise bad('send {"cvectors": [{"id", "scale"}]}; an empty list switches all of them off', param="cvectors")
    chosen = []
    for entry in given:
        if not isinstance(entry, dict):
            raise bad("cvectors must be a list of objects with id and scale", param="cvectors")
        number = fields.integer(entry, "id", 0, 1_000_000)
        scale = fields.number(entry, "scale", -STRENGTH_LIMIT, STRENGTH_LIMIT)
        if number is None or scale is None or number >= len(names):
            raise bad("each entry needs an id from GET /cvectors and a scale", param="cvectors")
        if scale:
            chosen.append((names[number], scale))
    if len(chosen) > 1:
        raise bad("only one profile can answer at a time; give the others scale 0", param="cvectors")
    service.default_profile, service.default_strength = chosen[0] if chosen else (None, 1.0)
    return Json(vectors(service, caller))


def vectors(service: Service, caller: Caller) -> list[dict[str, Any]]:
    usual = caller.profiles[0] if caller.bound else service.default_profile
    strength = 1.0 if caller.bound else service.default_strength
    return [
        {"id": i, "name": name, "scale": strength if name == usual else 0.0}
        for i, name in enumerate(service.profiles(caller))
    ]


# -- feedback ----------------------------------------------------------------------------------------------------------
@router.post("/v1/feedback", **takes(openapi.FEEDBACK))
async def give_feedback(request: Request) -> Response:
    """A verdict on an answer of the last days, by its id."""
    service = service_of(request)
    name, total, rows = await service.ledger.judge(verdict(body_of(request)), caller_of(request))
    service.metrics.count("feedback_rows", len(rows))
    service.learner.noticed(name, total)
    return Json(
        {
            "object": "feedback",
            "profile": name,
            "added": ["pair" if row.is_pair else "up" if row.label else "down" for row in rows],
            "rows": total,
            "learning": service.learner.state(name),
        }
    )


@router.get("/v1/feedback")
async def list_feedback(request: Request, profile: str | None = None) -> Response:
    service = service_of(request)
    name = asked_profile(service, caller_of(request), profile)
    page = {name: whole_number(request.query_params.get(name), name) for name in ("limit", "offset")}
    limit = PAGE if page["limit"] is None else page["limit"]
    return Json(await service.ledger.list(name, limit=limit, offset=page["offset"] or 0))


def whole_number(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise bad(f"{name} must be a whole number", param=name)
    return int(text)


@router.delete("/v1/feedback", **takes(openapi.FORGET))
async def forget_feedback(request: Request) -> Response:
    """{"profile", and one of "rows": [numbers], "matching": text, "everything": true}: erased for good."""
    service, body = service_of(request), body_of(request)
    name = asked_profile(service, caller_of(request), fields.text(body, "profile", most=64))
    rows = fields.items(body, "rows", most=10_000) or []
    if not all(isinstance(row, int) and not isinstance(row, bool) and 0 <= row < 2**62 for row in rows):
        raise bad("rows must be row numbers from GET /v1/feedback", param="rows")
    erased = await service.ledger.forget(
        name, ids=rows, matching=fields.text(body, "matching", most=4096), everything=fields.flag(body, "everything")
    )
    return Json({"object": "feedback.deleted", "profile": name, "deleted": erased})


def asked_profile(service: Service, caller: Caller, name: str | None) -> str:
    """The profile whose feedback is meant: the one named, else the caller's own."""
    if name:
        return name if name == FALLBACK_PROFILE and not caller.bound else service.check_profile(name, caller)
    return caller.profiles[0] if caller.bound else service.default_profile or FALLBACK_PROFILE
