"""What `tandem serve` says to a signal, by how far the cluster is."""

from __future__ import annotations

import io

from tandem.cluster.cli_display import Display
from tandem.cluster.cli_serve import SignalsTold


def test_a_signal_while_ray_starts_says_what_is_waited_for() -> None:
    stream = io.StringIO()
    told = SignalsTold(Display(stream))
    heard: list[tuple[str, str, float | None]] = []
    progress = told.follow(lambda *step: heard.append(step))
    progress("ray", "starting", None)
    told(1)
    progress("ray", "ready", None)
    progress("decode-0", "starting", None)
    told(2)
    assert stream.getvalue().splitlines() == [
        "stopping, as soon as Ray has started: that cannot be cut short",
        "stopping at once",
    ]
    assert heard == [("ray", "starting", None), ("ray", "ready", None), ("decode-0", "starting", None)]


def test_the_first_signal_to_a_cluster_that_serves_drains_it() -> None:
    stream = io.StringIO()
    told = SignalsTold(Display(stream))
    told.ready = True
    told(1)
    told(2)
    assert stream.getvalue().splitlines() == [
        "draining: running requests finish; Ctrl-C again stops at once",
        "stopping at once",
    ]
