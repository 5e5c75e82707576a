"""What engines on one machine take of each other, added to what the simulator said."""

from __future__ import annotations

import pytest
from tandem.cluster.bench.validate_beside import slowed
from tandem.cluster.sim.request import Asked, Outcome


def answer(
    name: str, arrival_s: float, first_s: float | None, last_s: float | None, prefill_s: float = 0.0, on: str = "p d"
) -> Outcome:
    prefill, decode = on.split()
    return Outcome(
        asked=Asked(request_id=name, arrival_s=arrival_s, prompt_token_ids=(0,), output_tokens=9),
        dispatched_s=arrival_s,
        first_token_s=first_s,
        last_token_s=last_s,
        prefill_s=prefill_s,
        prefill_worker=prefill,
        decode_worker=decode,
        output_tokens=9,
    )


def test_only_what_lies_beside_another_engine_takes_longer() -> None:
    decodes = answer("a", 0.0, 1.0, 5.0, prefill_s=1.0)
    prompt = answer("b", 2.0, 4.0, 4.0, prefill_s=1.5)  # computes from 2.5 to 4, waits from 2
    a, b = slowed([decodes, prompt], 0.1)
    assert a.first_token_s == pytest.approx(1.0), "nobody decoded yet"
    assert a.last_token_s == pytest.approx(5.0 + 0.1 * 1.5), "while b was computed"
    assert b.first_token_s == pytest.approx(4.0 + 0.1 * 2.0), "a decoded all the time that b waited or computed"
    assert b.last_token_s == b.first_token_s


def test_an_engine_does_not_stand_in_its_own_way_and_stretches_count_once() -> None:
    own = [answer(str(n), 0.0, 1.0 + n, 6.0, prefill_s=1.0, on="m m") for n in range(3)]
    assert slowed(own, 0.5) == own
    two = [answer("x", 0.0, 1.0, 6.0, prefill_s=1.0, on="n n"), answer("y", 0.0, 2.0, 8.0, prefill_s=1.0, on="n n")]
    first = slowed([own[0], *two], 0.5)[0]
    assert first.first_token_s == pytest.approx(1.5)
    assert first.last_token_s == pytest.approx(6.5 + 0.5 * 5.0), "both of n's answers at once are one engine's work"


def test_what_never_came_stays_away() -> None:
    refused = Outcome(asked=Asked(request_id="r", arrival_s=0.0, prompt_token_ids=(0,), output_tokens=1), refused="no")
    lost = answer("l", 0.0, 1.0, None, prefill_s=1.0)
    decodes = answer("a", 0.0, 0.5, 9.0, prefill_s=0.5, on="q d")
    found = slowed([refused, lost, decodes], 0.2)
    assert found[0] == refused
    assert (found[1].first_token_s, found[1].last_token_s) == (pytest.approx(1.2), None)
    assert slowed([refused, lost, decodes], 0.0) == [refused, lost, decodes]
