"""Runs a cluster on two nodes for a test, as `tandem serve` would: a JSON line for every thing that happens.

`drive.py CONFIG` starts it, then does what it is told, a line each: `ask` (a prompt of 77 tokens), `stop`.
"""

from __future__ import annotations

import json
import sys
import threading

from tandem.cluster.config_file import load_config
from tandem.cluster.launch.ray_cluster import RayCluster
from tandem.router.client import TandemClient

PROMPT = [(7 * i + 11) % 500 + 3 for i in range(77)]
OUTPUT = 8
_lock = threading.Lock()


def say(what: str, **values: object) -> None:
    """One event."""
    with _lock:
        print(json.dumps({"what": what, **values}), flush=True)


def main() -> None:
    """Until `stop`."""
    config = load_config(sys.argv[1])
    cluster = RayCluster(config, report=lambda line: say("report", line=line))
    try:
        endpoints = cluster.start()
        members = {
            view.name: {"pid": view.state.pid, "host": view.state.host, "rank_pids": view.state.rank_pids}
            for view in cluster.members()
        }
        say("started", members=members)
        for line in sys.stdin:
            if line.strip() == "stop":
                break
            with TandemClient(endpoints.grpc, api_key=config.router.api_keys[0], timeout_s=60) as client:
                answer = client.generate(
                    token_ids=PROMPT, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True
                ).collect()
            assert answer.timings is not None
            timings = answer.timings
            say("answer", tokens=list(answer.token_ids), path=timings.path, transport=timings.transport)
    except Exception as error:
        say("failed", error=f"{type(error).__name__}: {error}")
    finally:
        cluster.stop()
        say("stopped")


if __name__ == "__main__":
    main()
