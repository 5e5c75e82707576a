"""Where ranks find each other."""

from __future__ import annotations

import threading

import pytest
from tandem.cluster.engine.parallel.meeting import LOOPBACK, Meeting, group_hosts
from tandem.cluster.engine.parallel.messages import RankLost, decode_put, encode_put


def test_what_is_put_answers_who_has_asked_and_who_will() -> None:
    meeting, heard = Meeting(), []
    meeting.ask("stage/0/1", heard.append)
    assert heard == []
    meeting.put("stage/0/1", b"there")
    meeting.ask("stage/0/1", heard.append)
    assert heard == [b"there", b"there"]
    assert meeting.take("stage/0/1", 0.0) == b"there"


def test_who_waits_is_told_of_a_loss_and_of_its_time() -> None:
    meeting = Meeting()
    with pytest.raises(RankLost, match=r"no rank said k within 0\.01 s"):
        meeting.take("k", 0.01)
    loser = threading.Timer(0.05, meeting.fail, (RankLost("rank 3 has gone"),))
    loser.start()
    with pytest.raises(RankLost, match="rank 3 has gone"):
        meeting.take("k", 20.0)
    loser.join()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\xa1k", encode_put("k", b"v") + b"x", b"\x92\x01\xc4\x00"])
def test_what_puts_nothing_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="put: "):
        decode_put(data)
    assert decode_put(encode_put("k", b"v")) == ("k", b"v")


def test_groups_within_a_node_speak_over_loopback() -> None:
    near, far = "10.0.0.1", "10.0.0.2"
    assert group_hosts([near] * 4, 2) == [(LOOPBACK, LOOPBACK)] * 4
    assert group_hosts([near, near, far, far], 2) == [(LOOPBACK, near)] * 2 + [(LOOPBACK, far)] * 2
    assert group_hosts([near, far], 2) == [(near, LOOPBACK), (far, LOOPBACK)]
    assert group_hosts([near, far], 1) == [(LOOPBACK, near), (LOOPBACK, far)]
