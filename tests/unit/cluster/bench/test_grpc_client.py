"""The gRPC client: reading of serialized streams, addresses, and a run against a scripted server."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest
from grpc import aio
from tandem.cluster.bench.grpc_client import GrpcSender, grpc_address, read_messages
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.run import run_bench
from tandem.cluster.bench.server import ServerUnusable
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.proto import tandem_v1_pb2_grpc as pb_grpc
from tandem.cluster.tls import ClientTLS
from tandem.cluster.workload.datasets import BenchRequest


def piece(when_s: float, **fields: Any) -> tuple[float, bytes]:
    return when_s, pb.GenerateResponse(**fields).SerializeToString()


def test_tokens_timings_and_usage() -> None:
    pieces = [
        piece(1.0, token_ids=[5], text="a"),
        piece(2.0, token_ids=[6, 7], text=""),
        piece(3.0, finish_reason="length", timings=pb.Timings(queue_s=0.5, path="split")),
        piece(3.5, usage=pb.Usage(prompt_tokens=9, completion_tokens=3)),
    ]
    record = read_messages(pieces, "", due_s=0.0, sent_s=0.5)
    assert record.ok
    assert record.chunk_times_s == (1.0, 2.0)
    assert (record.prompt_tokens, record.output_tokens, record.text) == (9, 3, "a")
    assert record.timings == {"queue_s": 0.5, "path": "split"}


@pytest.mark.parametrize(
    ("pieces", "error", "words"),
    [
        ([piece(1.0, token_ids=[5])], "", "the stream had no end"),
        ([piece(1.0, token_ids=[5])], "UNAVAILABLE: gone", "UNAVAILABLE: gone"),
        ([(1.0, b"\xff\xff\xff")], "", "a message is not what such a stream is made of"),
    ],
)
def test_failures(pieces: list[tuple[float, bytes]], error: str, words: str) -> None:
    assert read_messages(pieces, error, due_s=0.0, sent_s=0.0).error == words


def test_addresses() -> None:
    assert grpc_address("h:1") == ("h:1", False)
    assert grpc_address("http://h:1") == ("h:1", False)
    assert grpc_address("grpcs://h:1") == ("h:1", True)
    for wrong in ("h", "ftp://h:1", "h:port", "http://h"):
        with pytest.raises(ValueError, match=r"base_url: .* allowed with tandem-grpc: host:port"):
            grpc_address(wrong)


class Scripted(pb_grpc.TandemServicer):
    """Answers with as many tokens as are asked for; refuses prompts of one token."""

    def __init__(self) -> None:
        self.seen: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(id="m", max_model_len=64)])

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> Any:
        self.seen.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if len(request.tokens.token_ids) == 1:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        for token in range(request.sampling.max_tokens):
            yield pb.GenerateResponse(token_ids=[token], text="x")
        usage = pb.Usage(prompt_tokens=len(request.tokens.token_ids), completion_tokens=request.sampling.max_tokens)
        yield pb.GenerateResponse(usage=usage)


def test_a_run_over_grpc() -> None:
    service = Scripted()

    async def main() -> Any:
        server = aio.server()
        pb_grpc.add_TandemServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        options = BenchOptions(
            backend="tandem-grpc",
            base_url=f"127.0.0.1:{port}",
            dataset_name="random",
            random_input_len=3,
            random_output_len=4,
            num_prompts=3,
            temperature=0.5,
            api_key="k",
            headers=(("x-slo-class", "batch"), ("x-slo-ttft-ms", "500"), ("X-Other", "1")),
        )
        result = await run_bench(options)
        sender = GrpcSender(f"127.0.0.1:{port}", api_key=None, tls=ClientTLS(), temperature=None, timeout_s=5.0)
        one = await sender.send(BenchRequest(prompt=(1,), max_tokens=1), 0.0)
        await sender.close()
        await server.stop(None)
        return result, one

    result, refused = asyncio.run(main())
    assert [record.error for record in result.records] == [""] * 3
    assert (result.summary.total_input_tokens, result.summary.total_output_tokens) == (9, 12)
    assert refused.error == "RESOURCE_EXHAUSTED: full"
    by_id = {request.request_id: place for place, request in enumerate(service.seen)}  # they come in any order
    place = by_id[f"{result.name}-0"]
    sent = service.seen[place]
    assert (sent.model, sent.slo_class, sent.slo_ttft_ms) == ("m", "batch", 500.0)
    assert sent.sampling == pb.SamplingOptions(max_tokens=4, ignore_eos=True, temperature=0.5)
    assert service.metadata[place]["authorization"] == "Bearer k"
    assert service.metadata[place]["x-other"] == "1"


def test_nobody_there() -> None:
    options = BenchOptions(backend="tandem-grpc", base_url="127.0.0.1:1", num_prompts=1)
    with pytest.raises(ServerUnusable, match=r"127\.0\.0\.1:1: UNAVAILABLE: Connection refused$"):
        asyncio.run(run_bench(options))


def test_a_port_that_speaks_http_is_said_to() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = BenchOptions(backend="tandem-grpc", base_url=f"127.0.0.1:{server.server_address[1]}", num_prompts=1)
        try:
            with pytest.raises(ServerUnusable, match="does not speak gRPC; is it the HTTP port"):
                asyncio.run(run_bench(options))
        finally:
            server.shutdown()
