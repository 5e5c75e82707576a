"""Who comes to be a rank, and who is turned away."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tandem.cluster.auth import OPEN, MemberCredentials
from tandem.cluster.config import SecurityConfig
from tandem.cluster.engine.parallel import door as module
from tandem.cluster.engine.parallel.door import CHALLENGE_BYTES, Offer, RankDoor, join
from tandem.cluster.engine.parallel.messages import RankLost

LOOPBACK = "127.0.0.1"
OURS = MemberCredentials.load(SecurityConfig(secret="the secret of this cluster"))
OTHERS = MemberCredentials.load(SecurityConfig(secret="the secret of another one"))
WAIT_S = 20.0


@pytest.fixture
def door() -> Iterator[RankDoor]:
    """For a rank of this node and one of another."""
    opened = RankDoor({1: False, 2: True}, LOOPBACK, OURS)
    yield opened
    opened.close()


def patient() -> None:
    """Nothing is known to be wrong."""


def test_ranks_come_with_the_links_that_they_need(door: RankDoor) -> None:
    with ThreadPoolExecutor(3) as pool:
        came = pool.submit(door.wait, WAIT_S, patient)
        theirs = [pool.submit(join, door.offer(rank), OURS, WAIT_S).result() for rank in (2, 1)]
        near, far = came.result()
    try:
        assert (near.rank, near.pid, near.host, near.leader_host, near.kv_link) == (1, os.getpid(), "", "", None)
        assert (far.rank, far.host, far.leader_host) == (2, LOOPBACK, LOOPBACK)
        assert near.link.family == socket.AF_UNIX
        assert far.kv_link is not None
        (far_steps, far_blocks), (near_steps, nothing) = theirs
        assert nothing is None
        assert far_blocks is not None
        for ours, other in ((near.link, near_steps), (far.link, far_steps), (far.kv_link, far_blocks)):
            ours.sendall(b"hello")
            assert other.recv(16) == b"hello"
    finally:
        for link in (near.link, far.link, far.kv_link, *(link for pair in theirs for link in pair)):
            if link is not None:
                link.close()


@pytest.mark.parametrize("rank", [1, 2])
def test_another_clusters_secret_and_another_lifes_key_are_turned_away(door: RankDoor, rank: int) -> None:
    offer = door.offer(rank)
    for shown, credentials in ((offer, OTHERS), (offer, OPEN), (replace(offer, key=bytes(32)), OURS)):
        with pytest.raises(RankLost, match="turned this rank away: is the cluster's secret the same"):
            join(shown, credentials, WAIT_S)
    with pytest.raises(RankLost, match=r"rank 1 did not come within 0\.1 s"):
        door.wait(0.1, patient)


def test_a_rank_that_is_not_awaited_is_turned_away(door: RankDoor) -> None:
    with pytest.raises(RankLost, match="turned this rank away"):
        join(replace(door.offer(1), rank=3), OURS, WAIT_S)


def test_a_proof_is_of_no_use_twice(door: RankDoor) -> None:
    """What one connection showed does not answer another one's challenge."""
    offer, heard = door.offer(2), []
    with socket.create_server((LOOPBACK, 0)) as between:
        eager = replace(offer, port=between.getsockname()[1])

        def listen() -> None:
            with between.accept()[0] as rank, socket.create_connection((offer.host, offer.port)) as leader:
                between.close()  # nobody is there when it comes again
                rank.sendall(leader.recv(CHALLENGE_BYTES, socket.MSG_WAITALL))
                heard.append(rank.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        with pytest.raises(ConnectionRefusedError):
            join(eager, OURS, WAIT_S)
        thread.join(WAIT_S)
    with socket.create_connection((offer.host, offer.port), WAIT_S) as again:
        again.recv(CHALLENGE_BYTES, socket.MSG_WAITALL)
        again.sendall(heard[0])
        assert again.recv(CHALLENGE_BYTES, socket.MSG_WAITALL) == bytes(CHALLENGE_BYTES)
        assert again.recv(1) == b""


def test_a_leader_that_knows_nothing_is_not_followed(door: RankDoor) -> None:
    with socket.create_server((LOOPBACK, 0)) as impostor:

        def answer() -> None:
            with impostor.accept()[0] as link:
                link.sendall(bytes(CHALLENGE_BYTES))
                link.recv(4096)
                link.sendall(b"x" * CHALLENGE_BYTES)
                link.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RankLost, match="not this rank's leader"):
            join(replace(door.offer(2), port=impostor.getsockname()[1]), OURS, WAIT_S)
        thread.join(WAIT_S)


def crowd(offer: Offer, size: int, source: str = LOOPBACK) -> list[socket.socket]:
    """Strangers who are in the door and say nothing."""
    came = []
    for _ in range(size):
        came.append(socket.create_connection((offer.host, offer.port), WAIT_S, source_address=(source, 0)))
        assert len(came[-1].recv(CHALLENGE_BYTES, socket.MSG_WAITALL)) == CHALLENGE_BYTES
    return came


def test_a_silent_stranger_is_sent_away_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch, door: RankDoor) -> None:
    monkeypatch.setattr(module, "PROOF_S", 0.1)
    (stranger,) = crowd(door.offer(2), 1)
    with stranger:
        assert stranger.recv(1) == b""


def test_silent_strangers_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROOF_S", 3600.0)
    monkeypatch.setattr(module, "MAX_IN_DOOR", 4)
    opened = RankDoor({1: True}, LOOPBACK, OURS)
    offer = opened.offer(1)
    strangers = crowd(offer, 4)
    try:
        with ThreadPoolExecutor(1) as pool:
            came = pool.submit(opened.wait, WAIT_S, patient)
            for link in join(offer, OURS, WAIT_S):
                assert link is not None
                link.close()
            (far,) = came.result()
        far.link.close()
        assert far.kv_link is not None
        far.kv_link.close()
    finally:
        opened.close()
        for stranger in strangers:
            stranger.close()


def test_a_rank_that_strangers_overtake_comes_again(monkeypatch: pytest.MonkeyPatch, door: RankDoor) -> None:
    """All places are taken between its challenge and its answer, with which its first connection is gone."""
    monkeypatch.setattr(module, "MAX_IN_DOOR", 2)
    offer, strangers = door.offer(2), list[socket.socket]()
    proof = module._rank_proof

    def overtaken(*arguments: object) -> bytes:
        if not strangers:
            strangers.extend(crowd(offer, 2))
        return proof(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_rank_proof", overtaken)
    try:
        for link in join(offer, OURS, WAIT_S):
            assert link is not None
            link.close()
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_crowd_is_in_nobody_elses_way(monkeypatch: pytest.MonkeyPatch, door: RankDoor) -> None:
    """Who came before it from another address keeps its place."""
    monkeypatch.setattr(module, "PROOF_S", 3600.0)
    monkeypatch.setattr(module, "MAX_IN_DOOR", 4)
    (first,) = crowd(door.offer(2), 1)
    strangers = crowd(door.offer(2), 8, "127.0.0.2")
    try:
        for stranger in strangers[:5]:
            assert stranger.recv(1) == b""
        for kept in (first, *strangers[5:]):
            kept.setblocking(False)
            with pytest.raises(BlockingIOError):
                kept.recv(1)
        door.close()
        first.settimeout(WAIT_S)
        assert first.recv(1) == b"", "nobody waits in a closed door"
    finally:
        for stranger in (first, *strangers):
            stranger.close()


def test_another_user_of_the_node_is_asked_nothing(monkeypatch: pytest.MonkeyPatch, door: RankDoor) -> None:
    user = os.geteuid()
    monkeypatch.setattr(module.os, "geteuid", lambda: user + 1)
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(WAIT_S)
        other.connect(f"\0{door.offer(1).name}")
        assert other.recv(1) == b""
    with pytest.raises(RankLost, match="the leader sent this rank away each time it came"):
        join(door.offer(1), OURS, 0.2)


@pytest.mark.parametrize(("asked", "heard"), [(0, 0), (CHALLENGE_BYTES, 0), (CHALLENGE_BYTES, 4096)])
def test_a_rank_that_is_sent_away_comes_again(door: RankDoor, asked: int, heard: int) -> None:
    """Before it was asked anything, while it answers, and after that."""
    offer = door.offer(1)
    with socket.socket(socket.AF_UNIX) as between, socket.socket(socket.AF_UNIX) as leader:
        between.bind(f"\0{offer.name}-full")
        between.settimeout(WAIT_S)
        between.listen()

        def listen() -> None:
            for _ in range(2):
                with between.accept()[0] as sent_away:
                    sent_away.sendall(bytes(asked))
                    if heard:
                        sent_away.recv(heard)
            with between.accept()[0] as rank:
                leader.connect(f"\0{offer.name}")
                rank.sendall(leader.recv(CHALLENGE_BYTES, socket.MSG_WAITALL))
                leader.sendall(rank.recv(4096))
                rank.sendall(leader.recv(CHALLENGE_BYTES, socket.MSG_WAITALL))

        with ThreadPoolExecutor(1) as pool:
            listening = pool.submit(listen)
            link, _ = join(replace(offer, name=f"{offer.name}-full"), OURS, WAIT_S)
            link.close()
            listening.result()


def test_who_waits_hears_of_a_rank_that_will_not_come(door: RankDoor) -> None:
    def check() -> None:
        raise RankLost("rank 2: its actor died")

    with pytest.raises(RankLost, match="its actor died"):
        door.wait(WAIT_S, check)


def test_a_closed_door_leaves_nothing(door: RankDoor) -> None:
    near, far = door.offer(1), door.offer(2)
    link, _ = join(near, OURS, WAIT_S)
    with link:
        door.close()
        door.close()
        with pytest.raises(ConnectionRefusedError):
            join(near, OURS, WAIT_S)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((far.host, far.port), 1.0).close()
        link.settimeout(WAIT_S)
        assert link.recv(1) == b""
