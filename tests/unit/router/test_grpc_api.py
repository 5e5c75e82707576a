"""`tandem.v1` with a generated stub, with reflection's own client, with the health service, and with `TandemClient`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.proto import tandem_v1_pb2_grpc as pb_grpc
from tandem.router.client import TandemClient, TandemError
from tandem.router.errors import DeadlineExceeded, Overloaded, Unavailable
from tandem.router.grpc_api import pause_s
from waits import WAIT_S, wait_until

TEXT = "Héllo, wörld"
NO_PROXY = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


@pytest.fixture
def channel(front: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(front.grpc, options=NO_PROXY) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.TandemStub:
    return pb_grpc.TandemStub(channel)


@pytest.fixture
def client(front: Any) -> Iterator[TandemClient]:
    with TandemClient(front.grpc, timeout_s=WAIT_S) as client:
        yield client


def test_generate(stub: pb_grpc.TandemStub, front: Any) -> None:
    request = pb.GenerateRequest(model="tiny", text="Hi", request_id="mine")
    responses = list(stub.Generate(request, timeout=WAIT_S - 1))  # on its way gRPC may round it up, by 0.1 s
    data = TEXT.encode()
    assert "".join(response.text for response in responses) == TEXT
    assert bytes(token for response in responses for token in response.token_ids) == data
    assert [response.finish_reason for response in responses] == [""] * (len(data) - 1) + ["stop"]
    last = responses[-1]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (2, len(data), 16)
    assert last.timings.tpot_s == pytest.approx(0.2 / (len(data) - 1))
    assert (last.timings.prefill_worker, last.timings.path, last.timings.transferred_bytes) == ("p0", "split", 4096)
    assert not any(response.HasField("usage") or response.HasField("timings") for response in responses[:-1])
    [request] = front.service.requests
    assert (request.client_request_id, request.n, request.sampling.max_tokens) == ("mine", 1, 254)
    assert request.timeout_s <= WAIT_S


def test_a_stream_leaves_time_to_the_others_and_its_first_tokens_wait_for_nobody() -> None:
    """64 streams of 10 ms steps: 6,400 tokens/s are sent one by one; twice as many could not be, and leave in pairs."""
    assert pause_s(1, 64) == pause_s(100, 1) == 0.0
    assert pause_s(2, 64) < 0.010
    assert 0.010 < pause_s(2, 128) < 0.020


def test_one_output_token_has_no_tpot(stub: pb_grpc.TandemStub) -> None:
    request = pb.GenerateRequest(text="Hi", sampling=pb.SamplingOptions(max_tokens=1))
    [response] = stub.Generate(request, timeout=WAIT_S)
    assert (response.text, response.finish_reason) == ("H", "length")
    assert not response.timings.HasField("tpot_s")


def test_chat_choices_and_logprobs(stub: pb_grpc.TandemStub, front: Any) -> None:
    request = pb.GenerateRequest(
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hi")]),
        sampling=pb.SamplingOptions(n=2, top_logprobs=1, max_tokens=2, temperature=0, logit_bias={65: 1.5}, stop=["z"]),
    )
    responses = list(stub.Generate(request, timeout=WAIT_S))
    assert [(r.choice, list(r.token_ids)) for r in responses] == [(0, [72]), (1, [72]), (0, [195]), (1, [195])]
    assert [r.HasField("usage") for r in responses] == [False, False, False, True]
    assert responses[-1].usage.completion_tokens == 4
    [logprob] = responses[2].logprobs
    assert (logprob.token_id, logprob.token, logprob.logprob) == (195, b"\xc3", -0.5)
    assert [(top.token_id, top.token, top.logprob) for top in logprob.top] == [(97, b"a", -1.0)]
    [request_] = front.service.requests
    assert bytes(request_.prompt_token_ids) == b"user: Hi\nassistant: "
    assert (request_.sampling.temperature, request_.sampling.logit_bias) == (0.0, ((65, 1.5),))
    assert request_.stop == ("z",)


def test_models(stub: pb_grpc.TandemStub) -> None:
    [model] = stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S).models
    assert (model.id, model.max_model_len) == ("tiny", 256)


OPTIONS = pb.SamplingOptions
INVALID: list[tuple[pb.GenerateRequest, str]] = [
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(text=""), "text"),
    (pb.GenerateRequest(text="x" * 256), "text"),
    (pb.GenerateRequest(chat=pb.ChatPrompt()), "chat.messages"),
    (pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(content="x")])), "chat.messages[0].role"),
    (pb.GenerateRequest(tokens=pb.TokenPrompt()), "tokens.token_ids"),
    (pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[300])), "tokens.token_ids"),
    (pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * 256)), "tokens.token_ids"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(temperature=-1)), "sampling.temperature"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(temperature=float("nan"))), "sampling.temperature"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(top_p=0)), "sampling.top_p"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(min_p=float("inf"))), "sampling.min_p"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(top_k=-5)), "sampling.top_k"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(n=0)), "sampling.n"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(max_tokens=0)), "sampling.max_tokens"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(max_tokens=256)), "sampling.max_tokens"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(min_tokens=9, max_tokens=8)), "sampling.min_tokens"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(top_logprobs=21)), "sampling.top_logprobs"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(stop=[""])), "sampling.stop"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(stop=["x"] * 17)), "sampling.stop"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(stop_token_ids=[300])), "sampling.stop_token_ids"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(logit_bias={300: 1})), "sampling.logit_bias"),
    (pb.GenerateRequest(text="x", sampling=OPTIONS(logit_bias={3: 101})), "sampling.logit_bias"),
]


def test_invalid_arguments_name_their_field(stub: pb_grpc.TandemStub, front: Any) -> None:
    for request, field in INVALID:
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request, timeout=WAIT_S))
        error: Any = refused.value
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, field
        assert error.details().startswith(f"{field}:"), error.details()
        [detail] = rpc_status.from_call(error).details
        bad = error_details_pb2.BadRequest()
        assert detail.Unpack(bad)
        assert bad.field_violations[0].field == field
    assert front.service.requests == []


@pytest.mark.parametrize("fail_at", [0, 3])
def test_statuses(stub: pb_grpc.TandemStub, front: Any, fail_at: int) -> None:
    front.service.fail_at = fail_at
    for raised, code in (
        (Overloaded("full", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("no decode worker"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    ):
        front.service.error = raised
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(pb.GenerateRequest(text="x"), timeout=WAIT_S))
        error: Any = refused.value
        assert (error.code(), error.details()) == (code, raised.message)
        metadata = dict(error.trailing_metadata())
        assert metadata.get("retry-after-ms") == ("1500" if raised.retry_after_s else None)
    with pytest.raises(grpc.RpcError) as missing:
        list(stub.Generate(pb.GenerateRequest(model="other", text="x"), timeout=WAIT_S))
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_unexpected_errors_are_internal_and_say_nothing(
    stub: pb_grpc.TandemStub, front: Any, caplog: pytest.LogCaptureFixture
) -> None:
    front.service.error = ValueError("secret")
    with pytest.raises(grpc.RpcError) as failed:
        list(stub.Generate(pb.GenerateRequest(text="x"), timeout=WAIT_S))
    assert failed.value.code() == grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
    assert "secret" not in failed.value.details()  # type: ignore[attr-defined]
    assert "secret" in caplog.text


@pytest.mark.parametrize("hang_at", [0, 2])
def test_canceling_cancels_the_request(stub: pb_grpc.TandemStub, front: Any, hang_at: int) -> None:
    front.service.hang_at = hang_at
    call = stub.Generate(pb.GenerateRequest(text="x"), timeout=WAIT_S)
    assert front.service.hanging.wait(WAIT_S)
    call.cancel()
    assert front.service.canceled.wait(WAIT_S)
    wait_until(lambda: front.service.running == 0)


def test_a_deadline_ends_the_request(stub: pb_grpc.TandemStub, front: Any) -> None:
    front.service.hang_at = 1
    with pytest.raises(grpc.RpcError) as late:
        list(stub.Generate(pb.GenerateRequest(text="x"), timeout=0.29))  # here by a millisecond
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert front.service.canceled.wait(WAIT_S)
    assert front.service.requests[0].timeout_s <= 0.3


def test_stopping_tells_the_client(stub: pb_grpc.TandemStub, front: Any) -> None:
    front.service.hang_at = 1
    call = stub.Generate(pb.GenerateRequest(text="x"), timeout=WAIT_S)
    assert next(call).text == "H"
    assert front.service.hanging.wait(WAIT_S)
    front.run(front.frontend.stop())
    with pytest.raises(grpc.RpcError, match="shutting down") as stopped:
        next(call)
    assert stopped.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert front.service.running == 0


def test_draining_refuses(stub: pb_grpc.TandemStub, front: Any) -> None:
    front.run(front.frontend.drain(WAIT_S))
    with pytest.raises(grpc.RpcError, match="draining") as refused:
        list(stub.Generate(pb.GenerateRequest(text="x"), timeout=WAIT_S))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_health_follows_readiness(channel: grpc.Channel, front: Any) -> None:
    health = health_pb2_grpc.HealthStub(channel)

    def check(service: str) -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status

    response = health_pb2.HealthCheckResponse
    assert {check(""), check("tandem.v1.Tandem")} == {response.SERVING}
    watch = health.Watch(health_pb2.HealthCheckRequest(service="tandem.v1.Tandem"), timeout=WAIT_S)
    assert next(watch).status == response.SERVING
    front.service.ready = False
    assert {check(""), check("tandem.v1.Tandem")} == {response.NOT_SERVING}
    assert next(watch).status == response.NOT_SERVING
    front.service.ready = True
    assert next(watch).status == response.SERVING
    watch.cancel()
    with pytest.raises(grpc.RpcError) as unknown:
        check("nobody.Service")
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_reflection_is_enough_to_call(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"tandem.v1.Tandem", "grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName("tandem.v1.Tandem").FindMethodByName("Generate")
    assert method.server_streaming
    request = message_factory.GetMessageClass(method.input_type)
    response = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_stream(
        "/tandem.v1.Tandem/Generate",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    assert "".join(answer.text for answer in call(request(text="Hi"), timeout=WAIT_S)) == TEXT


def test_client(client: TandemClient, front: Any) -> None:
    assert [model.id for model in client.models()] == ["tiny"]
    assert "".join(delta.text for delta in client.generate("Hi", max_tokens=4, stop="z")) == "Hél"
    answer = client.generate(messages=[{"role": "user", "content": "Hi"}], seed=3, top_logprobs=1).collect()
    assert (answer.text, answer.finish_reason) == (TEXT, "stop")
    assert answer.timings is not None
    assert answer.timings.path == "split"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(answer.token_ids) == len(answer.logprobs) == len(TEXT.encode())
    assert answer.logprobs[0].top == ((97, b"a", -1.0),)
    assert [a.text for a in client.generate(token_ids=[1, 2], n=2).collect_all()] == [TEXT, TEXT]
    assert [request.sampling.seed for request in front.service.requests][1] == 3
    with pytest.raises(ValueError, match="2 choices"):
        client.generate("Hi", n=2).collect()


CANNOT_BE_SENT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x"}, "prompt: no such argument (did you mean text?); allowed: text, messages, "),
    ({"text": "x", "logprobs": 3}, "logprobs: no such argument (did you mean top_logprobs?); allowed: top_logprobs, "),
    ({"text": "x", "temperatur": 1}, "temperatur: no such argument (did you mean temperature?); allowed: temperature"),
    ({"text": "x", "zzz": 1}, "zzz: no such argument; allowed: text, messages"),
    ({"text": "x", "max_tokens": -1}, "max_tokens: -1 is out of range; allowed: an integer from 1 to 2147483647"),
    ({"text": "x", "max_tokens": 1.5}, "max_tokens: 1.5 is not an integer"),
    ({"text": "x", "logit_bias": {-5: 3}}, "logit_bias: -5 is not a token id"),
    ({"text": "x", "logit_bias": [5]}, "logit_bias: [5] is not an object"),
    ({"text": "x", "temperature": "x"}, "temperature: 'x' is not a number; allowed: a number from 0 to 2"),
    ({"text": "x", "seed": 2**64}, "seed: 18446744073709551616 is out of range"),
    ({"text": "x", "stop": 5}, "stop: 5 is neither a string nor a list; allowed: a string or a list of stop strings"),
    ({"text": "x", "stop": ["a", "\ud800"]}, "stop: has U+D800 at character 0"),
    ({"text": "x", "ignore_eos": "yes"}, "ignore_eos: 'yes' is not a boolean"),
    ({"text": "a\ud800"}, "text: has U+D800 at character 1, a lone surrogate; allowed: Unicode text"),
    ({"text": 5}, "text: 5 is not a string"),
    ({"text": "x", "model": 5}, "model: 5 is not a string"),
    ({"token_ids": [1, -1]}, "token_ids: -1 is not a token id"),
    ({"token_ids": 5}, "token_ids: 5 is not a list"),
    ({"messages": "Hi"}, "messages: 'Hi' is not a list"),
    ({"messages": ["Hi"]}, "messages[0]: 'Hi' is no message"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content: [5] is not a string"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name: no such key; allowed: role"),
]


@pytest.mark.parametrize(("arguments", "message"), CANNOT_BE_SENT, ids=range(len(CANNOT_BE_SENT)))
def test_what_cannot_be_sent_is_named(arguments: dict[str, Any], message: str) -> None:
    with TandemClient("127.0.0.1:1") as client, pytest.raises(ValueError, match=re.escape(message)) as refused:
        client.generate(**arguments)
    assert str(refused.value).startswith(message)


def test_client_takes_the_seeds_that_http_takes(client: TandemClient, front: Any) -> None:
    assert client.generate("Hi", seed=-1).collect().text == TEXT
    assert front.service.requests[0].sampling.seed == 2**64 - 1


def test_client_errors(client: TandemClient, front: Any) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        client.generate("a", token_ids=[1])
    with pytest.raises(TandemError, match=r"INVALID_ARGUMENT: sampling\.top_p: 0"):
        client.generate("a", top_p=0.0).collect()
    front.service.error = Overloaded("full", retry_after_s=0.25)
    with pytest.raises(TandemError) as full:
        client.generate("a").collect()
    assert (full.value.code, full.value.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.25)


def test_leaving_a_clients_generation_cancels_it(client: TandemClient, front: Any) -> None:
    front.service.hang_at = 1
    with client.generate("a") as generation:
        assert next(iter(generation)).text == "H"
    assert front.service.canceled.wait(WAIT_S)


def test_a_key_is_wanted_where_one_is_set(start_front: Callable[..., Any]) -> None:
    front = start_front(api_key="s3cret")
    with TandemClient(front.grpc, api_key="s3cret") as client:
        assert client.generate("a").collect().text == TEXT
        assert client.models()
    for key in (None, "other"):
        with TandemClient(front.grpc, api_key=key) as client:
            for call in (client.models, lambda client=client: client.generate("a").collect()):
                with pytest.raises(TandemError) as refused:
                    call()
                assert refused.value.code == grpc.StatusCode.UNAUTHENTICATED
