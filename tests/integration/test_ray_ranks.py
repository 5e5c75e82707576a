"""Workers of two ranks on a Ray of their own, one of two stages and one whose layers are split: each rank is an actor,
and those of a worker begin and end as one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from one_rank import greedy_of_one_rank
from tandem.cluster.cli_status import fetch
from tandem.cluster.config_file import build_config
from tandem.cluster.launch.ray_cluster import RayCluster
from tandem.cluster.launch.state import Endpoints, MemberState, Phase
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
KEY = "open-sesame-and-more"
PROMPT = [(7 * i + 11) % 500 + 3 for i in range(77)]
OUTPUT = 8
SETTINGS = {
    "model": MODEL,
    "engine.dtype": "float32",
    "engine.kernels": "torch",
    "engine.kv_cache_bytes": 4 * 2**20,
    "prefill.engine.tensor_parallel": 2,
    "decode.engine.pipeline_stages": 2,
    "router.http_port": 0,
    "router.grpc_port": 0,
    "router.registry_port": 0,
    "router.api_key": KEY,
    "router.slo.ttft_s": 60,
    "router.slo.tpot_s": 10,
    "router.unready_wait_s": 60,
}
WAIT_S = 120.0


def answer(endpoints: Endpoints) -> list[int]:
    with TandemClient(endpoints.grpc, api_key=KEY, timeout_s=60) as client:
        asked = client.generate(token_ids=PROMPT, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True).collect()
        assert asked.timings.path == "split"
        return list(asked.token_ids)


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def worker(cluster: RayCluster, name: str) -> MemberState:
    return next(view.state for view in cluster.members() if view.name == name)


def test_ranks_are_actors_that_begin_and_end_with_their_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    expected, reports = greedy_of_one_rank(MODEL, PROMPT, OUTPUT), list[str]()
    cluster = RayCluster(build_config(None, SETTINGS), report=reports.append)

    def again(name: str, old: MemberState) -> None:
        """It is back as a whole, and answers as before."""

        def back() -> bool:
            now = worker(cluster, name)
            return now.phase is Phase.READY and now.epoch != old.epoch

        wait_for(f"{name} is back", back)
        new = worker(cluster, name)
        assert not {new.pid, *new.rank_pids} & {old.pid, *old.rank_pids}
        assert gone(old.pid)
        assert all(map(gone, old.rank_pids))
        assert answer(endpoints) == expected

    try:
        endpoints = cluster.start()
        assert answer(endpoints) == expected
        split, staged = worker(cluster, "prefill-0"), worker(cluster, "decode-0")
        for state in (split, staged):
            (rank,) = state.rank_pids
            assert Path(f"/proc/{rank}/cmdline").read_bytes().startswith(b"ray::")
        shown = {one["worker_id"]: one for one in fetch(f"http://{endpoints.http}", api_key=KEY)["workers"]}
        assert shown["prefill-0"]["other_ranks"] == [{"pid": split.rank_pids[0], "host": ""}]
        assert (shown["prefill-0"]["kernels"], shown["prefill-0"]["tensor_parallel"]) == ("torch", 2)

        (rank,) = split.rank_pids
        os.kill(rank, signal.SIGKILL)
        again("prefill-0", split)
        assert reports[0].startswith(f"prefill-0 died (rank 1 (pid {rank}"), reports

        os.kill(staged.pid, signal.SIGKILL)
        again("decode-0", staged)

        last = [worker(cluster, name) for name in ("prefill-0", "decode-0")]
        assert cluster.drain()
        cluster.stop()
        wait_for("nothing is left", lambda: all(map(gone, [pid for m in last for pid in (m.pid, *m.rank_pids)])))
    finally:
        cluster.stop(at_once=True)
