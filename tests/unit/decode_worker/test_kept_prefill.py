"""A decode attempt that ends before its first step leaves the KV where it is, unless it is told that all is over."""

from __future__ import annotations

from typing import Any

import pytest
from scenario import scenario
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import Role


def expected(tokens: int, n: int) -> list[int]:
    config = resolve_model("dummy:tiny-llama").config
    prompt = range(1, tokens + 1)
    return list(expected_tokens(prompt, n, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


async def end(worker: Any, how: str) -> None:
    """The first decode attempt is over; "aborted_whole": and the prefill with it."""
    if how == "router_gone":
        await worker.detach()
        await worker.until(lambda: not worker.shell.sequences_of("r"), "the broken stream to be noticed")
        return
    prefill_attempt = 1 if how == "aborted_whole" else 0
    await worker.stub.Abort(
        pb.AbortRequest(request_id="q", prefill_attempt=prefill_attempt, decode_attempt=1, router_id="r")
    )


@pytest.mark.parametrize("prefilled", [False, True])
@pytest.mark.parametrize("how", ["aborted", "router_gone", "aborted_whole"])
@scenario
async def test_the_next_decode_attempt_finds_the_kv(bench: Any, how: str, prefilled: bool) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as first, bench(Role.DECODE) as second:
        sequence = first.sequence()
        first.device.gate.clear()  # no first step
        if not prefilled:
            prefill.device.gate.clear()
        await prefill.prefill(sequence)
        await first.decode(sequence, await first.reserve(sequence), prefill)
        if prefilled:
            await first.until(first.device.computing.is_set, "the KV to be here")
        else:
            await prefill.until(lambda: prefill.leftovers().get("pulls"), "the pull to wait")
        await end(first, how)
        first.device.gate.set()
        await first.clean()
        prefill.device.gate.set()
        if how == "aborted_whole":
            await prefill.clean()  # long before its lease ends
            return
        sequence.decode_attempt = 2
        await second.decode(sequence, await second.reserve(sequence), prefill)
        await second.until(second.finished, "the answer")
        assert [second.tokens(attempt=2)[i] for i in range(4)] == expected(20, 4)
        await prefill.clean()
        await second.clean()
        assert prefill.shell.status().computed_tokens_total == 20


@scenario
async def test_an_abort_ends_the_halves_that_it_names(bench: Any) -> None:
    """A mixed worker runs either half of the same choice."""
    async with bench(Role.MIXED) as worker:
        sequence = worker.sequence()
        await worker.prefill(sequence)
        await worker.until(lambda: worker.leftovers().get("held"), "the KV to be held")
        assert await worker.reserve(sequence)
        await worker.stub.Abort(pb.AbortRequest(request_id="q", decode_attempt=9, router_id="r"))
        assert not worker.leftovers().get("credited_blocks")
        assert worker.leftovers()["held"] == 1
        await worker.stub.Abort(pb.AbortRequest(request_id="q", prefill_attempt=9, router_id="r"))
        await worker.clean()
        sequence.decode_attempt = sequence.prefill_attempt = 10
        assert await worker.reserve(sequence), "an abort of one half raises no floor for the other's later attempts"
