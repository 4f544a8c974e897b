"""The application of a worker, in this process: routes, health, key, CORS, documentation."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI

from shared.admission import Admission
from shared.http_app import make_app
from tests.shared.http.toy import make_handler


def ready() -> Admission:
    admission = Admission()
    admission.open(8, 8)
    return admission


def client(admission: Admission | None = None, **options: Any) -> httpx.AsyncClient:
    app = make_app(make_handler(), admission or ready(), worker="toy", **options)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker")


def document(**options: Any) -> dict[str, Any]:
    app: FastAPI = make_app(make_handler(), ready(), worker="toy", **options)
    return app.openapi()


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def test_the_native_route_answers_as_a_queue_endpoint_does() -> None:
    answer = await client().post("/runsync", json={"input": {"text": "hi"}})
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "COMPLETED"
    assert body["output"]["text"] == "hi"
    assert body["id"] == answer.headers["x-request-id"]
    assert isinstance(body["executionTime"], int)
    assert {"x-queue-time", "x-inference-time"} <= answer.headers.keys()


async def test_the_native_route_takes_an_openai_request_too() -> None:
    payload = {"openai_route": "/v1/chat/completions", "openai_input": CHAT}
    answer = await client().post("/runsync", json={"input": payload})
    assert answer.json()["output"]["object"] == "chat.completion"


async def test_a_native_error_is_a_failed_job_with_its_status() -> None:
    answer = await client().post("/runsync", json={"input": {"txt": "hi"}}, headers={"x-request-id": "r1"})
    assert answer.status_code == 400
    assert answer.json()["status"] == "FAILED"
    assert answer.json()["id"] == "r1"
    assert json.loads(answer.json()["error"])["code"] == "unknown_field"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"messages": []}, 200, None, None),
        ({}, 400, "missing_field", "messages"),
        ({**CHAT, "temperature": "0.5"}, 400, "invalid_value", "temperature"),
        ({**CHAT, "model": "other"}, 404, "model_not_found", "model"),
        ({**CHAT, "fail": "invalid"}, 400, "invalid_value", "text"),
        ({**CHAT, "fail": "crash"}, 500, "internal_error", None),
        ({**CHAT, "fail": "memory"}, 500, "out_of_memory", None),
    ],
)
async def test_openai_errors(body: dict[str, Any], status: int, code: str | None, param: str | None) -> None:
    answer = await client().post("/v1/chat/completions", json=body)
    assert answer.status_code == status
    if code:
        assert set(answer.json()) == {"error"}
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param)
        assert "secret details" not in error["message"]


async def test_unknown_routes_and_methods() -> None:
    answer = await client().get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
    assert "/v1/chat/completions" in answer.json()["error"]["message"]
    answer = await client().get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


async def test_models_are_listed_and_retrieved_by_names_with_slashes() -> None:
    listed = (await client().get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["toy", "org/toy"]
    assert (await client().get("/v1/models/org/toy")).json() == listed[1]
    answer = await client().get("/v1/models/other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_models_are_listed_while_every_slot_is_taken() -> None:
    admission = Admission()
    admission.open(1, 0)
    with admission.admit():
        assert (await client(admission).get("/v1/models")).status_code == 200
        refused = await client(admission).post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert refused.json()["error"]["code"] == "overloaded"


async def test_health_follows_the_state() -> None:
    admission = Admission()
    http = client(admission)

    async def states() -> tuple[int, str, int, str | None]:
        asked = await http.post("/v1/chat/completions", json=CHAT)
        state = (await http.get("/health")).json()["state"]
        return (
            (await http.get("/ping")).status_code,
            state,
            asked.status_code,
            asked.headers.get("retry-after"),
        )

    assert await states() == (204, "loading", 503, "2")
    admission.open(1, 1)
    assert await states() == (200, "ready", 200, None)
    assert (await http.head("/ping")).status_code == 200
    admission.close("draining")
    assert await states() == (503, "draining", 503, "2")
    admission.close("dead")
    assert await states() == (503, "dead", 503, "2")


async def test_only_the_second_out_of_memory_in_a_row_closes_the_worker() -> None:
    admission = ready()
    http = client(admission)
    memory, well = {"input": {"fail": "memory"}}, {"input": {"text": "hi"}}
    for body in (memory, well, memory):
        await http.post("/runsync", json=body)
        assert admission.state == "ready"
    await http.post("/runsync", json=memory)
    assert admission.state == "dead"


async def test_a_key_guards_all_but_the_health_checks() -> None:
    http = client(api_key="s3cret-key")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s3cret-key\u00e9"}):
        sent = {name: value.encode() for name, value in headers.items()}
        for method, path in (
            ("POST", "/runsync"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/toy"),
            ("GET", "/metrics"),
        ):
            answer = await http.request(method, path, json=CHAT, headers=sent)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert (await http.get("/ping")).status_code == 200
    assert (await http.get("/health")).status_code == 200
    good = {"authorization": "Bearer s3cret-key"}
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=good)).status_code == 200


async def test_browsers_of_other_origins_are_off_by_default() -> None:
    origin = {"origin": "https://app.example"}
    answer = await client().post("/v1/chat/completions", json=CHAT, headers=origin)
    assert "access-control-allow-origin" not in answer.headers
    http = client(origins=["https://app.example"])
    answer = await http.post("/v1/chat/completions", json=CHAT, headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    preflight = origin | {"access-control-request-method": "POST"}
    assert (await http.options("/v1/chat/completions", headers=preflight)).status_code == 200
    answer = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in answer.headers


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()


def test_the_openapi_document_describes_every_route_and_refers_to_nothing_missing() -> None:
    made = document()
    OpenAPI.model_validate(made)
    assert made["paths"].keys() == {
        "/runsync", "/v1/chat/completions", "/v1/audio/transcriptions", "/v1/audio/speech", "/v1/models",
        "/v1/models/{name}", "/ping", "/health", "/metrics",
    }  # fmt: skip
    schemas = made["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in references(made)} <= schemas.keys()
    assert "HTTPValidationError" not in schemas  # FastAPI's, which no answer is
    operations = [operation for path in made["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert all(answer.get("description") for op in operations for answer in op["responses"].values())
    work = made["paths"]["/runsync"]["post"]
    body = work["requestBody"]["content"]["application/json"]["schema"]
    native, openai = body["properties"]["input"]["anyOf"]
    assert native == {"$ref": "#/components/schemas/WorkRequest"}
    assert openai["properties"]["openai_route"]["enum"] == [*make_handler().routes]
    answer = work["responses"]["200"]["content"]
    output = answer["application/json"]["schema"]["properties"]["output"]
    assert {"$ref": "#/components/schemas/WorkResponse"} in output["anyOf"]
    assert answer.keys() == {"application/json", "text/event-stream", "text/plain", "audio/wav"}
    data = answer["text/event-stream"]["itemSchema"]["properties"]["data"]
    assert "#/components/schemas/WorkPart" in references(data["anyOf"][0]["contentSchema"])
    listed = made["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]
    assert listed["application/json"]["schema"] == {"$ref": "#/components/schemas/ModelList"}
    responses = made["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert responses.keys() == {"200", "400", "404", "408", "413", "429", "500", "503"}
    error = responses["429"]
    assert error["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert "Retry-After" in error["headers"]
    assert "security" not in work


def test_the_openapi_document_has_a_form_for_routes_that_take_files() -> None:
    made = document()
    content = made["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    assert list(content) == ["multipart/form-data", "application/json"]
    assert content["multipart/form-data"]["schema"]["properties"]["file"]["format"] == "binary"
    file = made["components"]["schemas"]["TranscribeRequest"]["properties"]["file"]
    assert (file["type"], file.get("format")) == ("string", None)  # base64 or a URL
    chat = made["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert list(chat) == ["application/json"]


def test_the_openapi_document_names_the_key() -> None:
    made = document(api_key="s3cret-key")
    assert made["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert made["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}]
    assert "s3cret-key" not in json.dumps(made)
