"""The server is what its description says: requests drawn from it, valid and not, get what it declares."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from gossamer.core.bundle import Bundle
from gossamer.serving.app import build_app
from gossamer.serving.engine import Capacity, Engine
from gossamer.serving.limits import Settings
from gossamer.serving.schema import not_offered
from gossamer.serving.server import background

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def small(opened: Any, bundle: Bundle) -> Iterator[Engine]:
    with opened(bundle, capacity=Capacity(slots=8, queue=8), max_length=24) as engine:
        yield engine


def draw(operation: Any, mode: GenerationMode) -> None:
    """Requests of one operation, all that they ask for or something wrong with each."""

    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        # grammars are slow to make and have tests of their own
        for name in ("response_format", "guided_regex") if isinstance(case.body, dict) else ():
            case.body.pop(name, None)
        case.call_and_validate(checks=CHECKS)

    holds()


def test_what_is_described_holds(small: Engine, until: Any) -> None:
    with background(build_app(small, Settings(seconds=60))) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            draw(operation, GenerationMode.POSITIVE)
            if operation.method == "post":
                draw(operation, GenerationMode.NEGATIVE)
        assert until(lambda: small.load()["running"] == small.load()["waiting"] == 0, 5)


def test_the_description_names_models_errors_and_what_is_not_offered(address: str) -> None:
    found = json.load(urllib.request.urlopen(f"{address}/openapi.json"))
    text = json.dumps(found)
    assert "422" not in text
    assert "HTTPValidationError" not in text
    body = found["components"]["schemas"]["ChatRequest"]
    assert body["additionalProperties"] is False
    assert body["properties"]["model"]["enum"] == ["tiny"]
    answers = found["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers) == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503", "504"}
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"tools", "audio", "store", "dimensions", "suffix"} <= not_offered()
    assert not {"temperature", "model", "messages", "user"} & not_offered()
