"""Runs tests/golden/scheduler_*.txt: transcripts of a scheduler driven step by step, meant to be read.

A line that begins with `> ` is a command, the indented lines under it are what it printed; everything else is comment.
`UPDATE_GOLDEN=1 pytest …` rewrites the indented lines. After every command `check_integrity` must hold.

    > engine policy=mixed blocks=8 size=4 budget=8 running=4 waiting=4 len=64 plans=1 [batching=request]   (first)
             [ahead=yes] [parts=2] [part_rows=3]
    > submit a prompt=1..10 max=3 [handoff=out|in] [output=5,6] [draws=7,0] [stop=9] [salt=x] [slo=x] [share=2] [due=1]
             [presence=1]
    > launch / > finish        schedule a plan / complete the oldest one;   > step [n] does both, n times
    > finish a                 … and the device fails on row a
    > kv_ready a 7   > writer_done a   > release a   > abort a   > role decode

Tokens drawn are 100 + output index unless `draws` says otherwise; 0 is end of sequence.
In plans `a[8:10]→#0` computes positions 8 and 9 of `a` and draws its output token 0; `a[10?]→#1` computes position 10
from the token that is being drawn. Blocks print as id.generation.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import pytest
from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import DRAWN, RowOutput, StepOutput, StepPlan, StepRow
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import QueueFull, Scheduler
from tandem.cluster.engine.scheduler_events import (
    BlocksGranted,
    Preempted,
    PrefillAdvanced,
    SchedulerEvent,
    SequenceFailed,
    TokensEmitted,
)
from tandem.cluster.types import Handoff, Role, SampledToken, SamplingParams, SequenceSpec, Urgency

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
TRANSCRIPTS = sorted(GOLDEN.glob("scheduler_*.txt"))


def ids(text: str) -> tuple[int, ...]:
    """`1..3,9` is 1, 2, 3, 9."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


class Transcript:
    def __init__(self) -> None:
        self.outstanding: deque[StepPlan] = deque()
        self.draws: dict[str, tuple[int, ...]] = {}

    def run(self, line: str) -> list[str]:
        name, *words = line.split()
        positional = [word for word in words if "=" not in word]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        printed: list[str] = getattr(self, f"do_{name}")(*positional, **options)
        printed += [self.show_event(event) for event in self.scheduler.take_events()]
        self.scheduler.check_integrity()
        return [*printed, self.show_ledger()]

    def do_engine(
        self,
        policy: str,
        blocks: str,
        size: str,
        budget: str,
        running: str,
        waiting: str,
        len: str,
        plans: str = "1",
        batching: str = "iteration",
        ahead: str = "",
        parts: str = "1",
        part_rows: str = "1",
    ) -> list[str]:
        self.outstanding.clear()
        self.pool = BlockPool(int(blocks), int(size))
        self.scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, True),
            policy=policy_for(Role(policy), batching),
            clock=VirtualClock(),
            max_batched_tokens=int(budget),
            max_running=int(running),
            max_waiting=int(waiting),
            max_model_len=int(len),
            eos_token_ids=(0,),
            max_outstanding_plans=int(plans),
            looks_ahead=bool(ahead),
            decode_parts=int(parts),
            decode_part_rows=int(part_rows),
        )
        return []

    def do_submit(
        self,
        seq_id: str,
        prompt: str,
        max: str,
        handoff: str = "none",
        output: str = "",
        draws: str = "",
        stop: str = "",
        salt: str = "",
        slo: str = "",
        share: str = "1",
        due: str = "inf",
        presence: str = "0",
    ) -> list[str]:
        self.draws[seq_id] = ids(draws)
        spec = SequenceSpec(
            seq_id=seq_id,
            prompt_token_ids=ids(prompt),
            output_token_ids=ids(output),
            sampling=SamplingParams(max_tokens=int(max), stop_token_ids=ids(stop), presence_penalty=float(presence)),
            handoff=Handoff(handoff),
            cache_salt=salt.encode(),
            urgency=Urgency(slo_class=slo, share=float(share), deadline_s=float(due)),
        )
        try:
            self.scheduler.add(spec)
        except (QueueFull, ValueError) as error:
            return [f"refused, {type(error).__name__}: {error}"]
        return []

    def do_launch(self) -> list[str]:
        plan = self.scheduler.schedule()
        if plan is None:
            return ["nothing to compute now"]
        self.outstanding.append(plan)
        return [f"plan {plan.plan_id}: " + "  ".join(self.show_row(row) for row in plan.rows)]

    def do_finish(self, failing: str = "") -> list[str]:
        if not self.outstanding:
            return ["no plan is outstanding"]
        plan = self.outstanding.popleft()
        self.scheduler.complete(StepOutput(plan.plan_id, tuple(self.draw(row, failing) for row in plan.rows)))
        return [f"plan {plan.plan_id} is complete"]

    def do_step(self, times: str = "1") -> list[str]:
        printed: list[str] = []
        for _ in range(int(times)):
            printed += self.do_launch()
            if self.outstanding:
                self.do_finish()
            self.scheduler.check_integrity()
            printed += [self.show_event(event) for event in self.scheduler.take_events()]
        return printed

    def do_kv_ready(self, seq_id: str, token: str) -> list[str]:
        self.scheduler.kv_ready(seq_id, SampledToken(int(token)))
        return []

    def do_writer_done(self, seq_id: str) -> list[str]:
        self.scheduler.writer_done(seq_id)
        return []

    def do_release(self, seq_id: str) -> list[str]:
        self.scheduler.release(seq_id)
        return []

    def do_abort(self, seq_id: str) -> list[str]:
        return ["aborted" if self.scheduler.abort(seq_id) else "nothing to abort"]

    def do_role(self, role: str) -> list[str]:
        self.scheduler.set_policy(policy_for(Role(role)))
        return []

    def draw(self, row: StepRow, failing: str) -> RowOutput:
        if row.seq_id == failing:
            return RowOutput(row.seq_id, error="logits are not numbers")
        if row.sample is None:
            return RowOutput(row.seq_id)
        index, scripted = row.sample.output_index, self.draws[row.seq_id]
        return RowOutput(row.seq_id, (SampledToken(scripted[index] if index < len(scripted) else 100 + index),))

    def show_row(self, row: StepRow) -> str:
        draws = f"→#{row.sample.output_index}" if row.sample else ""
        if list(row.token_ids) == [DRAWN]:
            return f"{row.seq_id}[{row.start}?]{draws}"
        return f"{row.seq_id}[{row.start}:{row.start + len(row.token_ids)}]{draws}"

    def show_event(self, event: SchedulerEvent) -> str:
        match event:
            case BlocksGranted():
                blocks = " ".join(f"{ref.block_id}.{ref.generation}" for ref in event.blocks)
                return f"· {event.seq_id} is granted blocks {blocks}, {event.cached_tokens} tokens cached"
            case PrefillAdvanced():
                return f"· {event.seq_id} has KV of {event.computed_tokens} tokens"
            case Preempted():
                return f"· {event.seq_id} is preempted"
            case SequenceFailed():
                return f"· {event.seq_id} failed: {event.message}"
            case TokensEmitted():
                (token,) = event.tokens
                why = f", {event.finish_reason}" if event.finish_reason else ""
                stop = f" on {event.stop_token_id}" if event.stop_token_id is not None else ""
                return f"· {event.seq_id} #{event.index} = {token.token_id}{why}{stop}"

    def show_ledger(self) -> str:
        load = self.scheduler.load()
        states = f"waiting {load.waiting} running {load.running} held {load.held}"
        blocks = f"{load.free_blocks} free {load.cached_blocks} cached"
        tables = [f"{name} [{' '.join(map(str, self.pool.table(name)))}]" for name in sorted(self.pool.holders())]
        return " | ".join([f"= {states}", blocks, *tables])


def replay(text: str) -> str:
    transcript, lines = Transcript(), []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        if line.startswith("> "):
            lines += [f"    {printed}" for printed in transcript.run(line[2:])]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    want = path.read_text(encoding="utf-8")
    got = replay(want)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(got, encoding="utf-8")
    else:
        assert got == want


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 9
