"""How fast a pipeline of processes decodes with one plan under way, and with as many as it has stages.

    .venv/bin/python tests/load/pipeline.py [--model dummy:smollm2-135m] [--stages 2] [--rows 8,16,32] [--rounds 3]

Every stage is a process with one thread: it wants as many idle processors as there are stages. Both ways alternate, and
must give the same answers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Sequence

from tandem.cluster.clock import MonotonicClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import SchedulerEvent, TokensEmitted
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role, SamplingParams, SequenceSpec
from tandem.cluster.worker.engine_thread import EngineThread

PROMPT_TOKENS = 16
LIMIT_S = 300.0


def decode(device: CpuDevice, plans: int, rows: int, tokens: int) -> tuple[float, float, dict[str, list[int]]]:
    """Tokens and steps a second, prompts included, and the answers."""
    device.plans_ahead = plans
    pool = BlockPool(device.num_blocks, device.kv.layout.block_size)
    scheduler = Scheduler(
        block_pool=pool,
        prefix_cache=PrefixCache(pool, enabled=False),
        policy=policy_for(Role.MIXED),
        clock=MonotonicClock(),
        max_batched_tokens=1024,
        max_running=rows,
        max_waiting=rows,
        max_model_len=PROMPT_TOKENS + tokens + 1,
        eos_token_ids=(),
        max_outstanding_plans=plans,
        decode_parts=plans,
    )
    answers: dict[str, list[int]] = {str(row): [] for row in range(rows)}
    left, over, failures = set(answers), threading.Event(), list[BaseException]()

    def hear(events: Sequence[SchedulerEvent]) -> None:
        for event in events:
            if isinstance(event, TokensEmitted):
                answers[event.seq_id] += [token.token_id for token in event.tokens]
                if event.finish_reason is not None:
                    left.discard(event.seq_id)
        if not left:
            over.set()

    def fail(error: BaseException) -> None:
        failures.append(error)
        over.set()

    def add(scheduler: Scheduler) -> None:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        for row in range(rows):
            prompt = tuple((7 * row + 11 * place) % 500 + 3 for place in range(PROMPT_TOKENS))
            scheduler.add(SequenceSpec(seq_id=str(row), prompt_token_ids=prompt, sampling=sampling))

    thread = EngineThread(scheduler, device, on_events=hear, on_failure=fail)
    thread.submit(add)
    start_s = time.monotonic()
    thread.start()
    if not over.wait(LIMIT_S) or failures:
        raise SystemExit(f"the pipeline did not answer: {failures}")
    took_s = time.monotonic() - start_s
    thread.stop(LIMIT_S)
    return rows * tokens / took_s, thread.status.steps_total / took_s, answers


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:smollm2-135m")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rows", default="8,16,32")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    device = CpuDevice(
        resolve_model(asked.model),
        dtype="float32",
        kernels="torch",
        block_size=16,
        kv_cache_bytes=2**28,
        cpus=tuple(sorted(os.sched_getaffinity(0))[: asked.stages]),
        pipeline_stages=asked.stages,
    )
    try:
        print(f"{asked.model}, {asked.stages} stages, medians of {asked.rounds} rounds")
        print(f"{'rows':>5} {'plans':>6} {'tokens/s':>9} {'steps/s':>8} {'against one plan':>17}")
        for rows in map(int, asked.rows.split(",")):
            found: dict[int, list[tuple[float, float]]] = {1: [], asked.stages: []}
            for _ in range(asked.rounds):
                answers = []
                for plans in found:
                    tokens_s, steps_s, given = decode(device, plans, rows, asked.tokens)
                    found[plans].append((tokens_s, steps_s))
                    answers.append(given)
                if any(given != answers[0] for given in answers):
                    raise SystemExit(f"{rows} rows: answers depend on how many plans are under way")
            one = statistics.median(tokens_s for tokens_s, _ in found[1])
            for plans, rates in found.items():
                tokens_s, steps_s = (statistics.median(rate[place] for rate in rates) for place in (0, 1))
                print(f"{rows:5} {plans:6} {tokens_s:9.1f} {steps_s:8.1f} {tokens_s / one:16.2f}x")
    finally:
        device.close()


if __name__ == "__main__":
    main()
