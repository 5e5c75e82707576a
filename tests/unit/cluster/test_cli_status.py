"""What `tandem status` shows of who computes in a worker, and in which order workers stand."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from tandem.cluster import cli_restart, cli_status
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.router.describe import describe

WIDEST = "the widest that znver4 has"


def worker(name: str, **values: Any) -> dict[str, object]:
    role = name.partition("-")[0]
    return describe(pb.WorkerStatus(worker_id=name, role=role, device="cpu", **values)) | {"state": "ready"}


def table(first: str, *workers: dict[str, object]) -> list[str]:
    """The rows below the header that begins with `first`."""
    for block in cli_status.render("u", {"ready": True, "workers": list(workers)}).split("\n\n"):
        header, *rows = block.splitlines()
        if header.startswith(first):
            return rows
    raise AssertionError(f"no table {first}")


def test_a_worker_of_one_process() -> None:
    plain = worker(
        "decode-0",
        pid=7,
        threads=2,
        kernels="compiled",
        kernels_reason=WIDEST,
        tensor_parallel=1,
        pipeline_stages=1,
        kv_dtype="bfloat16",
    )
    (row,) = table("compute", plain)
    assert re.split(r"  +", row) == ["decode-0", "TP 1", "2", "7", "bfloat16", f"compiled: {WIDEST}"]


def test_a_worker_of_several_ranks_shows_its_split_and_every_process() -> None:
    ranks = [pb.RankProcess(pid=8), pb.RankProcess(pid=9, host="10.0.0.2"), pb.RankProcess(pid=10, host="10.0.0.2")]
    split = worker(
        "prefill-0",
        pid=7,
        threads=2,
        kernels="torch",
        kv_dtype="int8",
        tensor_parallel=2,
        pipeline_stages=2,
        other_ranks=ranks,
    )
    (row,) = table("compute", split)
    assert re.split(r"  +", row) == ["prefill-0", "TP 2 PP 2", "2 each", "7, 8, 9, 10 on 10.0.0.2", "int8", "torch"]
    assert split["other_ranks"] == [
        {"pid": 8, "host": ""},
        {"pid": 9, "host": "10.0.0.2"},
        {"pid": 10, "host": "10.0.0.2"},
    ]


def test_a_worker_too_old_to_say_shows_nothing() -> None:
    (row,) = table("compute", {"worker_id": "decode-0", "role": "decode", "state": "ready"})
    assert row.split() == ["decode-0", "-", "-", "-", "-", "-"]


def test_workers_stand_by_pool_and_number_whoever_restarted_last() -> None:
    names = ("decode-10", "mixed-0", "decode-2", "prefill-0")
    rows = table("worker", *(worker(name) for name in names))
    assert [row.split()[0] for row in rows] == ["prefill-0", "decode-2", "decode-10", "mixed-0"]


def test_a_restarted_worker_is_back_with_all_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = [
        worker("decode-0", epoch=epoch, pid=pid, address="h:1", other_ranks=[pb.RankProcess(pid=pid + 1)])
        for epoch, pid in ((1, 7), (2, 17))
    ]
    looks = itertools.chain([lives[0], lives[0]], itertools.repeat(lives[1]))
    monkeypatch.setattr(cli_restart, "fetch", lambda url, **_: {"ready": True, "workers": [next(looks)]})

    async def ask_to_leave(address: str, url: str, timeout_s: float) -> None:
        assert address == "h:1"

    monkeypatch.setattr(cli_restart, "ask_to_leave", ask_to_leave)
    said: list[str] = []
    assert cli_restart.restart("u", ["decode-0"], every=False, timeout_s=3.0, say=said.append) == 0
    assert said[0] == "decode-0 drains, for up to 3 s, and restarts"
    assert said[1].endswith("(processes 17, 18, epoch 00000000)")
