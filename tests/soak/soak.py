"""Many short requests, a fifth of them cancelled, while workers are killed every few seconds; then nothing may be left.

    .venv/bin/python tests/soak/soak.py --requests 20000                    # paced device: computes nothing
    .venv/bin/python tests/soak/soak.py --requests 1000 --device cpu        # the real model, fp32, greedy

Each request is accounted for exactly once: answered (with the right tokens, or it counts as wrong), refused, cancelled
or failed with a reason, by the client and by the router's own log, which are compared one by one. Ends with one JSON
object and exit code 0 if nothing was wrong, lost, counted twice or leaked, and, in a run that is long enough to tell,
no process's memory or number of descriptors grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

sys.path.insert(0, str(Path(__file__).parent))  # a script of its own, not part of a package

from soak_cluster import SoakCluster, by_age, grows, growth, with_free_ports
from tandem.cluster.config import EngineConfig, RouterConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.proto.tandem_v1_pb2_grpc import TandemStub

SAMPLE_EVERY_S = 2.0
CANCEL_SHARE = 0.2
LONG_S = 60.0
"""Shorter runs are still filling caches and pools."""
REFUSED = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakOptions:
    """One run."""

    requests: int
    device: str = "paced"
    concurrency: int = 32
    pairs: int = 2
    kill_every_s: float = 4.0
    seed: int = 0
    timeout_s: float = 60.0


@dataclass(slots=True)
class Tally:
    """What the client saw, by the name it gave each request."""

    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to send and the greedy answer to expect."""

    token_ids: tuple[int, ...]
    answer: tuple[int, ...]


def engine_of(device: str) -> EngineConfig:
    """Small and quick on `paced`; on `cpu` the real model in fp32, where answers do not depend on the batch."""
    if device == "paced":
        return EngineConfig(
            model="dummy:tiny-llama",
            device="paced",
            kv_cache_bytes=4 * 2**20,
            paced_step_s=0.002,
            paced_prefill_token_s=0.00002,
            paced_decode_row_s=0.0001,
        )
    return EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=256 * 2**20, max_model_len=512)


async def prompts_of(options: SoakOptions, engine: EngineConfig, stub: Any) -> list[Prompt]:
    """Prompts with shared beginnings. On `cpu` the expected answers are asked for beforehand, undisturbed."""
    rng = random.Random(options.seed)
    config = resolve_model(engine.model).config
    beginnings = [[rng.randrange(3, config.vocab_size) for _ in range(rng.randrange(16, 65))] for _ in range(4)]
    count, longest = (200, 96) if options.device == "paced" else (24, 24)
    prompts = []
    for _ in range(count):
        own = [rng.randrange(3, config.vocab_size) for _ in range(rng.randrange(1, longest))]
        token_ids = (rng.choice(beginnings) if rng.random() < 0.5 else []) + own
        if options.device == "paced":
            answer = list(
                expected_tokens(token_ids, 12, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
            )
        else:
            reference = stub.Generate(_request(token_ids, 12, "reference"), timeout=60)
            answer = [token_id async for message in reference for token_id in message.token_ids]
        prompts.append(Prompt(tuple(token_ids), tuple(answer)))
    return prompts


def _request(token_ids: Any, max_tokens: int, name: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=token_ids),
        sampling=pb.SamplingOptions(temperature=0, max_tokens=max_tokens),
        request_id=name,
    )


async def one_request(stub: Any, prompt: Prompt, name: str, rng: random.Random, tally: Tally, timeout_s: float) -> None:
    """Sends one, reads or cancels it, and writes down how it ended."""
    max_tokens = rng.randrange(1, 13)
    cancel_after = rng.randrange(0, max_tokens) if rng.random() < CANCEL_SHARE else None
    call = stub.Generate(_request(prompt.token_ids, max_tokens, name), timeout=timeout_s)
    tokens: list[int] = []
    try:
        if cancel_after == 0:
            await asyncio.sleep(rng.uniform(0, 0.05))
            call.cancel()
        async for message in call:
            tokens += message.token_ids
            if cancel_after is not None and len(tokens) >= cancel_after:
                call.cancel()
        outcome = "answered"
        if tuple(tokens) != prompt.answer[:max_tokens]:
            tally.wrong.append(f"{name}: {tokens} instead of {prompt.answer[:max_tokens]}")
    except aio.AioRpcError as error:
        outcome = "refused" if error.code() in REFUSED else "failed"
        tally.reasons[f"{outcome}: {error.code().name}: {(error.details() or '')[:100]}"] += 1
    except asyncio.CancelledError:
        outcome = "canceled"
        if tuple(tokens) != prompt.answer[: len(tokens)]:
            tally.wrong.append(f"{name}: {tokens} before it was cancelled")
    assert name not in tally.outcomes, f"{name} ends twice"
    tally.outcomes[name] = outcome


async def storm(options: SoakOptions, stub: Any, prompts: list[Prompt], tally: Tally) -> None:
    """`concurrency` clients, each with one request at a time, until all were sent."""
    names = iter(range(options.requests))

    async def client(index: int) -> None:
        rng = random.Random(options.seed * 1000 + index)
        for number in names:
            prompt = rng.choice(prompts)
            await one_request(stub, prompt, f"soak-{number}", rng, tally, options.timeout_s)

    await asyncio.gather(*(client(index) for index in range(options.concurrency)))


def disagreements(tally: Tally, events: Path) -> list[str]:
    """Where the router's log does not say once, and the same, how a request ended.

    A request that its client cancelled may never have reached the router, or may have been answered before it heard.
    """
    logged: dict[str, list[str]] = {}
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "request" and event["client_request_id"].startswith("soak-"):
            logged.setdefault(event["client_request_id"], []).append(event["outcome"])
    found = []
    for name, outcome in tally.outcomes.items():
        seen = logged.get(name, [])
        once = seen == [outcome] or (outcome == "canceled" and len(seen) <= 1)
        if not once:
            found.append(f"{name}: {outcome} at the client, {seen} at the router")
    return found


async def soak(options: SoakOptions, folder: Path) -> dict[str, Any]:
    """The whole run; its report."""
    engine, events = engine_of(options.device), folder / "events.jsonl"
    router = with_free_ports(RouterConfig(model=engine.model, events_path=str(events), max_attempts=8))
    cluster = SoakCluster(folder, engine, pairs=options.pairs, router=router)
    tally, rng = Tally(), random.Random(options.seed)
    try:
        await cluster.start()
        async with aio.insecure_channel(cluster.router.addresses["grpc"]) as channel:
            stub = TandemStub(channel)
            prompts = await prompts_of(options, engine, stub)
            background = [
                asyncio.create_task(cluster.sample_forever(SAMPLE_EVERY_S)),
                asyncio.create_task(cluster.kill_now_and_then(options.kill_every_s, rng)),
            ]
            start_s = time.monotonic()
            try:
                await storm(options, stub, prompts, tally)
            finally:
                took_s = time.monotonic() - start_s
                broken = [task.exception() for task in background if task.done() and not task.cancelled()]
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
            if broken:
                raise RuntimeError(f"the soak's own machinery broke: {broken}")
            await cluster.restart_missing()
            await cluster.wait_ready()
            left = await cluster.wait_clean()
    finally:
        await cluster.close()
    return report(options, cluster, tally, disagreements(tally, events), left, took_s)


def report(
    options: SoakOptions, cluster: SoakCluster, tally: Tally, parted: list[str], left: dict[str, Any], took_s: float
) -> dict[str, Any]:
    """What was seen, as one JSON object."""
    return {
        "device": options.device,
        "requests": options.requests,
        "took_s": round(took_s, 1),
        "outcomes": dict(Counter(tally.outcomes.values())),
        "reasons": dict(tally.reasons.most_common(20)),
        "wrong": tally.wrong[:20],
        "accounted_differently": parted[:20],
        "leaked": left,
        "kills": {name: member.kills for name, member in cluster.workers.items()},
        "router": (router := growth(cluster.router.samples)),
        "workers_by_age": (ages := by_age(cluster.workers.values())),
        "grows": grows(router, ages) if took_s >= LONG_S else [],
    }


def unharmed(result: dict[str, Any]) -> bool:
    """Nothing wrong, lost, counted twice or leaked, and nothing that grows."""
    whole = sum(result["outcomes"].values()) == result["requests"]
    return whole and not any(result[name] for name in ("wrong", "accounted_differently", "leaked", "grows"))


def main() -> int:
    """Runs one soak from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--device", choices=("paced", "cpu"), default="paced")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--kill-every-s", type=float, default=4.0)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = SoakOptions(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = asyncio.run(soak(options, Path(folder)))
    print(json.dumps(result, indent=1))
    return 0 if unharmed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
