"""A worker's other rank in a process of its own, its kernels interpreted: what these tests start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tandem.cluster.engine.parallel.rank_process import RankProcess, _Child


def interpreted(num_ranks: int) -> list[RankProcess]:
    """A `Recruit`, as `rank_process.children`."""
    return [_spawn(rank) for rank in range(1, num_ranks)]


def _spawn(rank: int) -> RankProcess:
    link, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
    return _Child(rank, process, link)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import triton_here

    if triton_here.choose() == "cpu":
        from tandem.cluster.engine.gpu import inputs

        inputs.multiprocessors = lambda device: 2  # as `conftest.few_multiprocessors`
    from tandem.cluster.engine.parallel.follower import serve

    serve(socket.socket(fileno=int(sys.argv[1])))
