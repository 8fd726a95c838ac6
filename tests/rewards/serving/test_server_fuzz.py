"""The server against requests that are made up from its own OpenAPI description."""

from __future__ import annotations

import random
from collections.abc import Callable
from uuid import uuid4

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.transport.serialization import Binary

from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import random_scene, render
from rewards.geneval.reward import GenEvalReward
from rewards.serving.protocol import ScoreReply, encode_image

pytestmark = pytest.mark.slow

quick = settings(
    phases=[Phase.generate], deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
images = [encode_image(Image.fromarray(render(random_scene(random.Random(seed))))) for seed in range(4)]


@pytest.fixture
def url(serve: Callable[..., str]) -> str:
    return serve({"geneval": GenEvalReward(ShapesDetector())})


def described(url: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json", trust_env=False).json())


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_made_up_request_breaks_it(url: str, mode: GenerationMode) -> None:
    """Every answer is one that is described, none is a 5xx, and what the schema forbids is refused."""
    statuses = set()

    @settings(quick, max_examples=40)
    @given(described(url)["/v1/score"]["POST"].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        # That parts and names fit each other is beyond a schema.
        response = case.call_and_validate(base_url=url, excluded_checks=[positive_data_acceptance])
        statuses.add(response.status_code)

    check()
    assert statuses and max(statuses) < 500
    assert mode is not GenerationMode.NEGATIVE or 200 not in statuses


def test_made_up_requests_with_images_are_answered(url: str) -> None:
    """Whatever the prompts and metadata: one result per item, in 200."""
    seen = set()

    @settings(quick, max_examples=40)
    @given(
        described(url)["/v1/score"]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE),
        st.lists(st.one_of(st.sampled_from(images), st.binary()), min_size=1, max_size=4),
        st.sampled_from(
            [{}, {"tag": "counting", "include": [{"class": "circle", "count": 1}]}, {"tag": 1, "include": 2}]
        ),
    )
    def check(case: schemathesis.Case, files: list[bytes], metadata: dict[str, object]) -> None:
        request = case.body["request"]
        request["id"] = str(uuid4())  # made-up ids repeat
        names = [f"img{n}" for n in range(len(files))]
        for n, item in enumerate(request["items"]):
            item.update(images=[names[n % len(names)]], source=[], metadata={**item.get("metadata", {}), **metadata})
        used = {
            name: Binary(data)
            for name, data in zip(names, files, strict=True)
            if [name] in [i["images"] for i in request["items"]]
        }
        case.body = {"request": request, **used}
        response = case.call_and_validate(base_url=url)
        assert response.status_code == 200, response.text
        results = ScoreReply.model_validate_json(response.content).results
        assert len(results) == len(request["items"])
        seen.update("ok" if result.valid else result.error for result in results)

    check()
    assert {"ok", "bad_image", "missing_need", "scorer_error"} <= seen


@pytest.mark.parametrize("path", ["/v1/health", "/v1/rewards"])
def test_the_other_addresses(url: str, path: str) -> None:
    @settings(quick, max_examples=5)
    @given(described(url)[path]["GET"].as_strategy())
    def check(case: schemathesis.Case) -> None:
        assert case.call_and_validate(base_url=url).status_code == 200

    check()
