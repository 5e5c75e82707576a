"""A worker or a router as a plain process, without Ray, for tests and debugging.

`python -m tandem.cluster.launch.process worker|router --config FILE.json` prints one JSON line with its addresses
when it serves, drains on SIGTERM, SIGINT and the workers' `Drain` call, and dies with its parent.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ..config import RouterConfig, WorkerConfig, from_dict
from ..parent import die_with_parent
from .members import RouterMember, WorkerMember
from .stages import Stages

EXIT_ENGINE_FAILED = 70


def _worker(
    config: WorkerConfig, start_timeout_s: float, on_leave: Callable[[float], None], stages: Stages
) -> WorkerMember:
    def on_failure(error: BaseException) -> None:
        print(f"worker {config.worker_id}: the engine failed: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_ENGINE_FAILED)

    member = WorkerMember(
        config, progress=lambda stage, _: stages.enter(stage), on_failure=on_failure, on_leave=on_leave
    )
    member.start(start_timeout_s)
    return member


def main(arguments: list[str] | None = None) -> int:
    """Runs one member until a signal; returns the exit status."""
    stages = Stages("process and imports")
    parser = argparse.ArgumentParser(prog="tandem.cluster.launch.process", description=__doc__)
    parser.add_argument("kind", choices=("worker", "router"))
    parser.add_argument("--config", type=Path, required=True, help="JSON of a WorkerConfig or RouterConfig")
    parser.add_argument("--start-timeout-s", type=float, default=120.0)
    parser.add_argument("--drain-timeout-s", type=float, default=10.0)
    parser.add_argument("--orphan", action="store_true", help="do not die with the parent process")
    options = parser.parse_args(arguments)
    if not options.orphan:
        die_with_parent()
    logging.basicConfig(
        level=os.environ.get("TANDEM_LOG", "WARNING").upper(), format="%(asctime)s %(name)s %(message)s"
    )
    stop = threading.Event()
    drain_timeout_s: float = options.drain_timeout_s

    def leave(timeout_s: float) -> None:
        nonlocal drain_timeout_s
        drain_timeout_s = timeout_s
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    values = json.loads(options.config.read_text())
    member: WorkerMember | RouterMember
    try:
        if options.kind == "worker":
            member = _worker(from_dict(WorkerConfig, values), options.start_timeout_s, leave, stages)
            addresses = {"address": member.address, "kv_address": member.kv_address, "epoch": member.epoch}
        else:
            member = RouterMember(from_dict(RouterConfig, values), progress=lambda stage, _: stages.enter(stage))
            member.start(options.start_timeout_s)
            addresses = {
                "http": member.http_address,
                "grpc": member.grpc_address,
                "registry": member.registry_address,
            }
    except (ValueError, OSError) as error:
        print(f"{options.kind}: {error}", file=sys.stderr, flush=True)
        return 1
    print(json.dumps({"pid": os.getpid(), **addresses, "started_s": stages.end()}), flush=True)
    stop.wait()
    member.drain(drain_timeout_s)
    member.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
