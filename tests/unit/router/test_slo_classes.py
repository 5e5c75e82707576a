"""The promise of a request as both doors read it: classes, own numbers, and what is refused, in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest
from tandem.cluster.bench.client import Target
from tandem.cluster.bench.options import parse_headers
from tandem.cluster.config import ConfigError, RouterConfig, SLOClass
from tandem.router.client import TandemClient, TandemError

ASK = {"model": "tiny", "prompt": "x", "max_tokens": 2}


def http(front: Any, **headers: str) -> httpx.Response:
    named = {f"x-slo-{name.replace('_', '-')}": value for name, value in headers.items()}
    return httpx.post(f"{front.url}/v1/completions", json=ASK, headers=named, trust_env=False)


def test_no_class_is_interactive_under_the_routers_own_promise(front: Any) -> None:
    assert http(front).status_code == 200
    with TandemClient(front.grpc) as client:
        client.generate("x", max_tokens=2).collect()
    for request in front.service.requests:
        promise = request.promise
        assert (promise.slo_class, promise.ttft_s, promise.tpot_s, promise.share) == ("interactive", 10.0, 0.5, 0.9)
        assert not promise.own_ttft


def test_class_and_own_numbers_come_through_both_doors(start_front: Callable[..., Any]) -> None:
    front = start_front(slo_classes={"gold": SLOClass(ttft_s=0.5, share=2.0)})
    assert http(front, **{"class": "gold", "tpot_ms": "40.5"}).status_code == 200
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    headers = {"x-slo-class": "gold", "x-slo-tpot-ms": "40.5"}
    answer = httpx.post(f"{front.url}/v1/chat/completions", json=chat, headers=headers, trust_env=False)
    assert answer.status_code == 200
    with TandemClient(front.grpc) as client:
        client.generate("x", max_tokens=2, slo_class="gold", slo_tpot_ms=40.5).collect()
    assert len(front.service.requests) == 3
    for request in front.service.requests:
        promise = request.promise
        assert (promise.slo_class, promise.ttft_s, promise.tpot_s) == ("gold", 0.5, 0.0405)
        assert (promise.share, promise.own_ttft, promise.own_tpot) == (2.0, False, True)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("class", "platinum", "'platinum' is no class here; allowed: interactive, batch"),
        ("ttft_ms", "0", "0.0 is out of range"),
        ("ttft_ms", "-5", "-5.0 is out of range"),
        ("ttft_ms", "nan", "nan is out of range"),
        ("ttft_ms", "inf", "inf is out of range"),
        ("ttft_ms", "1e12", "out of range; allowed: a number above 0 up to 8.64e+07"),
        ("tpot_ms", "soon", "'soon' is not a number"),
        ("tpot_ms", "", "'' is not a number"),
        ("tpot_ms", "1_000", "'1_000' is not a number"),
    ],
)
def test_http_refuses_what_is_no_promise_naming_the_header(
    shared_front: Any, field: str, value: str, words: str
) -> None:
    answer = http(shared_front, **{field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"x-slo-{field.replace('_', '-')}")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"slo_class": "platinum"}, "slo_class", "'platinum' is no class here; allowed: interactive, batch"),
        ({"slo_ttft_ms": 0.0}, "slo_ttft_ms", "0.0 is out of range"),
        ({"slo_ttft_ms": float("nan")}, "slo_ttft_ms", "nan is out of range"),
        ({"slo_tpot_ms": -1.0}, "slo_tpot_ms", "-1.0 is out of range"),
    ],
)
def test_grpc_refuses_in_the_same_words(shared_front: Any, given: dict[str, Any], param: str, words: str) -> None:
    with TandemClient(shared_front.grpc) as client, pytest.raises(TandemError) as refused:
        client.generate("x", **given).collect()
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.message.startswith(f"{param}: {words}")


def test_the_client_refuses_what_no_message_could_hold(shared_front: Any) -> None:
    with TandemClient(shared_front.grpc) as client:
        with pytest.raises(ValueError, match="slo_ttft_ms: 'fast' is not a number"):
            client.generate("x", slo_ttft_ms="fast")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="slo_class: 7 is not a string"):
            client.generate("x", slo_class=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "Gold", "a b", "x" * 65, "ü"])
def test_a_class_in_the_configuration_has_a_name_that_a_header_can_carry(name: str) -> None:
    with pytest.raises(ConfigError, match="slo_classes"):
        RouterConfig(slo_classes={name: SLOClass()})
    assert RouterConfig(slo_classes={"gold-2": SLOClass()}).slo_classes["gold-2"].share == 1.0


def test_a_bounded_number_of_classes() -> None:
    with pytest.raises(ConfigError, match="at most 32"):
        RouterConfig(slo_classes={f"c{i}": SLOClass() for i in range(33)})


def test_the_bench_sends_what_it_is_told() -> None:
    assert parse_headers(["x-slo-ttft-ms=500", "a=b=c"], "batch") == (
        ("x-slo-class", "batch"),
        ("x-slo-ttft-ms", "500"),
        ("a", "b=c"),
    )
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_headers(["nonsense"])
    with pytest.raises(ValueError, match="header: 'a'"):
        Target(base_url="http://h", model="m", headers=(("a", "b\r\nc: d"),))
