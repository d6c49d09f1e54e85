"""Every route against requests made from the server's own OpenAPI document, sound ones and broken ones."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import given, HealthCheck, Phase, settings
from hypothesis import strategies as st
from live_server import bearer, fake_engine, keys_of, Live, serving
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from edge_align.config import ServerConfig
from edge_align.home import Home
from edge_align.server.app import create_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SOUND, BROKEN = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
BOUNDS = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)


DOCUMENT = create_app(home=Home(Path("unused")), open_engine=fake_engine())._app.openapi()  # type: ignore[attr-defined]
ROUTES = {(method.upper(), path): route for path, found in DOCUMENT["paths"].items() for method, route in found.items()}


def test_the_document_holds_no_answer_that_is_never_given():
    assert not [name for name, route in ROUTES.items() if "422" in route["responses"]]
    assert "ValidationError" not in json.dumps(DOCUMENT)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Live, Home]]:
    """A server with two keys; the one in use is bound to ann, and bob's name is for nobody to hear."""
    home = Home(tmp_path_factory.mktemp("fuzzed") / "home")
    for name in ("ann", "bob"):
        (home.profiles_dir / name).mkdir(parents=True)
    config = ServerConfig(max_tokens=4, learn="off")
    with serving(home, open_engine=fake_engine(), config=config, keys=keys_of(ann=("ann",), bob=("bob",))) as live:
        yield live, home


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*name, SOUND) for name in ROUTES] + [(*name, BROKEN) for name, route in ROUTES.items() if "requestBody" in route],
)
def test_every_route_answers_as_its_document_says_and_tells_nothing(served, method, path, mode):
    live, home = served
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method]

    @BOUNDS
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call(base_url=live.url, headers=bearer("ann"), timeout=60)
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            said = response.content.decode()
            assert str(home.root) not in said and "bob" not in said and "Traceback" not in said

    check()


# -- what nobody's document would say ----------------------------------------------------------------------------------
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, -(2**63), 2**63, 2**64, 10**400, -(10**400)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["up", "down", "../../etc/passwd", "\x00", "\ud800", "chatcmpl-1"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = st.sampled_from(
    ["id", "completion_id", "index", "rating", "edited", "preferred_over", "preferred_over_index", "reason"]
    + ["profile", "rows", "matching", "everything", "cvectors"]
)


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/feedback"), ("DELETE", "/v1/feedback")])
def test_verdicts_of_any_shape_are_taken_or_refused_with_a_sentence(served, method, path):
    live, _ = served
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    known = live.chat(headers=bearer("ann")).json["id"]

    @settings(BOUNDS, max_examples=150)
    @given(st.dictionaries(FIELDS, VALUES, max_size=6), st.booleans())
    def check(body, real):
        data = json.dumps(body | ({"id": known} if real else {}))
        head = {"Content-Type": "application/json", **bearer("ann")}
        connection.request(method, path, data.encode("utf-8", "surrogatepass"), head)
        reply = connection.getresponse()
        found = json.loads(reply.read())
        assert reply.status in (200, 400, 403, 404), found
        assert reply.status == 200 or len(found["error"]["message"]) > 10

    try:
        check()
    finally:
        connection.close()


# -- numbers -----------------------------------------------------------------------------------------------------------
NEEDED = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "id": "x", "cvectors": []}


def numbers() -> list[tuple[str, str]]:
    """(path, field) of every number that a body may hold."""
    found = []
    for path, methods in DOCUMENT["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, schema in body.get("schema", {}).get("properties", {}).items():
            if {"integer", "number"} & {*schema.get("type", [])} or name == "rating":
                found.append((path, name))
    return found


@pytest.mark.parametrize(("path", "name"), numbers())
def test_negative_and_huge_numbers_are_refused_by_a_short_sentence(fake, path, name):
    more = {"logprobs": True} if name == "top_logprobs" else {}
    for value in (-(10**400), 10**400, -(2**63) - 1, 2**64 + 1, 1e308, -1e308):
        reply = fake.ask("POST", path, {**NEEDED, **more, name: value})
        assert reply.status == 400 and 10 < len(str(reply.json["error"])) < 500, (value, reply.data)
