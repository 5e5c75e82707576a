"""A pipeline's plans under way: waited for in order, told when they are done, errors where the logits were due."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tandem.cluster.engine.parallel.under_way import UnderWay

WAIT_S = 20.0


def test_waiting_ends_with_the_oldest_plan_or_with_who_wakes() -> None:
    under_way, gates, wake = UnderWay(), [threading.Event(), threading.Event()], threading.Event()

    def finish(number: int) -> np.ndarray:
        assert gates[number].wait(WAIT_S)
        return np.full((1, 2), number, np.float32)

    pending = [under_way.add(lambda number=number: finish(number)) for number in (0, 1)]
    wake.set()
    assert not under_way.wait(wake)
    wake.clear()
    threading.Timer(0.01, gates[0].set).start()
    assert under_way.wait(wake)
    assert wake.is_set()
    assert under_way.done()
    assert pending[0]().tolist() == [[0, 0]]
    assert not under_way.done()
    wake.clear()
    threading.Timer(0.01, gates[1].set).start()
    assert pending[1]().tolist() == [[1, 1]]
    assert not under_way.wait(wake)  # nothing is under way
    under_way.close()
    under_way.close()


def test_what_went_wrong_is_raised_where_the_logits_are_asked_for_and_wakes_who_waits() -> None:
    under_way, wake = UnderWay(), threading.Event()

    def lost() -> np.ndarray:
        raise ConnectionError("rank 1 is gone")

    pending = under_way.add(lost)
    assert under_way.wait(wake)
    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        pending()
    under_way.close()
