"""Keys of clients: which count, when a file of them is read again, and that doubt lets nobody in."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tandem.cluster.clock import VirtualClock
from tandem.cluster.config import ConfigError, RouterConfig
from tandem.router import api_keys
from tandem.router.api_keys import LOOK_S, MAX_FILE_BYTES, MAX_KEYS, ApiKeys
from tandem.router.client import TandemClient, TandemError

ONE, TWO, THREE = "first-key-0123456789", "second-key-0123456789", "third-key-0123456789"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny", "max_tokens": 4}
MEMBER_ONLY = ("/v1/models", "/v1/models/tiny", "/metrics")


class FileOfKeys:
    """A key file, and keys that follow it by a clock of their own."""

    def __init__(self, path: Path, *fixed: str) -> None:
        self.path = path
        self.clock = VirtualClock()
        self.write(ONE)
        self.keys = ApiKeys(fixed, path, self.clock)

    def write(self, *lines: str) -> None:
        scratch = self.path.with_suffix(".new")
        scratch.write_text("\n".join(lines) + "\n")
        scratch.chmod(0o600)
        scratch.replace(self.path)

    def let_in(self, *asked: str) -> list[str]:
        """Those that get in at the next look."""
        self.clock.advance(LOOK_S)
        return [key for key in asked or (ONE, TWO, THREE) if self.keys.admit(key)]


@pytest.fixture
def filed(tmp_path: Path) -> FileOfKeys:
    return FileOfKeys(tmp_path / "keys")


def test_each_of_several_keys_counts_and_nothing_else() -> None:
    keys = ApiKeys.from_config(RouterConfig(api_key=f"{ONE}, {TWO}"))
    assert keys.wanted
    asked = (ONE, TWO, THREE, "", ONE.upper(), f"{ONE},{TWO}", ONE[:-1])
    assert [key for key in asked if keys.admit(key)] == [ONE, TWO]


def test_without_any_none_is_wanted_and_none_gets_in() -> None:
    keys = ApiKeys.from_config(RouterConfig())
    assert not keys.wanted
    assert not keys.admit("")


def test_every_key_is_compared_whichever_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, shown: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, shown)

    monkeypatch.setattr(api_keys, "hmac", type("Counting", (), {"compare_digest": staticmethod(compare)}))
    keys = ApiKeys((ONE, TWO, THREE))
    for key in (ONE, THREE, "wrong"):
        compared.clear()
        keys.admit(key)
        assert compared == [hashlib.sha256(known.encode()).digest() for known in (ONE, TWO, THREE)]


def test_a_key_is_given_and_taken_without_a_restart(filed: FileOfKeys) -> None:
    assert filed.let_in() == [ONE]
    filed.write(ONE, TWO)
    assert filed.let_in() == [ONE, TWO]
    filed.write(TWO)
    assert filed.let_in() == [TWO]


def test_the_file_is_looked_at_once_a_second_at_most(filed: FileOfKeys) -> None:
    filed.clock.advance(LOOK_S)
    assert filed.keys.admit(ONE)
    filed.write(TWO)
    filed.clock.advance(LOOK_S * 0.9)
    assert filed.keys.admit(ONE)
    filed.clock.advance(LOOK_S * 0.2)
    assert not filed.keys.admit(ONE)
    assert filed.keys.admit(TWO)


def test_a_file_that_did_not_change_is_not_read_again(filed: FileOfKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    filed.let_in()
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was read again"))
    assert filed.let_in() == [ONE]


def test_a_change_in_place_of_the_same_length_counts(filed: FileOfKeys) -> None:
    before = filed.path.stat()
    with filed.path.open("r+") as file:
        file.write(TWO[: len(ONE)])
    os.utime(filed.path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert filed.let_in(ONE) == []


@pytest.mark.parametrize("end", ["gone", "empty", "comments", "a folder", "not text", "too large"])
def test_a_file_that_gives_no_keys_lets_nobody_in_until_it_does(
    filed: FileOfKeys, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert filed.let_in() == [ONE]
    filed.path.unlink()
    if end == "a folder":
        filed.path.mkdir()
    elif end != "gone":
        large = b"k" * (MAX_FILE_BYTES + 1)
        content = {"empty": b"", "comments": b"# none\n\n", "not text": b"\xff\n", "too large": large}
        filed.path.write_bytes(content[end])
    with caplog.at_level(logging.ERROR):
        assert [filed.let_in() for _ in range(3)] == [[], [], []]
    assert len([record for record in caplog.records if "nobody gets in" in record.message]) == 1, "said once"
    assert filed.keys.wanted, "still no open door"
    if end == "a folder":
        filed.path.rmdir()
    filed.write(TWO)
    assert filed.let_in() == [TWO]


def test_keys_of_the_configuration_outlive_the_file(tmp_path: Path) -> None:
    filed = FileOfKeys(tmp_path / "keys", THREE)
    filed.path.unlink()
    assert filed.let_in() == [THREE]


def test_comments_blanks_and_what_is_no_key_are_passed_over(
    filed: FileOfKeys, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        filed.write("\ufeff# keys", "", f"  {ONE}  # Ann's", f"{TWO}\t# Bob's", "two words", "ümlaut-0123456789", "#x")
        assert filed.let_in(ONE, TWO, "two words", "two", "ümlaut-0123456789", "#x", "") == [ONE, TWO]
    assert [record.message.split(" of ")[0] for record in caplog.records] == [
        "api_keys_file: line 5",
        "api_keys_file: line 6",
    ]


def test_there_is_a_bound_on_their_number(filed: FileOfKeys) -> None:
    names = [f"key-number-{index:06d}" for index in range(MAX_KEYS + 1)]
    filed.write(*names)
    assert filed.let_in(names[0], names[-2], names[-1]) == [names[0], names[-2]]


def test_a_file_that_cannot_be_read_at_the_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^api_keys_file: .*/none' is not allowed; allowed: a readable file"):
        ApiKeys.from_config(RouterConfig(api_keys_file=str(tmp_path / "none")))


def test_short_keys_and_readable_files_are_warned_of_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("hidden2\n")
    path.chmod(0o644)
    with caplog.at_level(logging.DEBUG):
        ApiKeys.from_config(RouterConfig(api_key="hidden1", api_keys_file=str(path)))
    said = " ".join(record.message for record in caplog.records)
    assert said.count("shorter than 16 characters") == 2
    assert "can be read by other users" in said
    assert "hidden" not in said


@pytest.mark.parametrize("wrong", ["a,,b", "two words", "ümlaut", "tab\tbed", ",x9"])
def test_a_key_that_no_client_could_send_is_refused_and_not_shown(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^api_key: '…' is not allowed") as error:
        RouterConfig(api_key=wrong)
    assert wrong not in str(error.value)


# --- at the two doors -------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileOfKeys:
    monkeypatch.setattr(api_keys, "LOOK_S", 0.0)
    return FileOfKeys(tmp_path / "keys")


def status_of(front: Any, key: str | None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answers = [httpx.post(f"{front.url}{CHAT}", json=BODY, headers=headers)]
    answers += [httpx.get(f"{front.url}{path}", headers=headers) for path in MEMBER_ONLY]
    (status,) = {answer.status_code for answer in answers}
    return status


def code_of(front: Any, key: str | None) -> grpc.StatusCode:
    codes = set()
    with TandemClient(front.grpc, api_key=key, timeout_s=20) as client:
        for ask in (client.models, lambda: client.generate("Hi", max_tokens=4).collect()):
            try:
                ask()
                codes.add(grpc.StatusCode.OK)
            except TandemError as error:
                codes.add(error.code)
    (code,) = codes
    return code


def test_both_doors_follow_the_file(start_front: Callable[..., Any], key_file: FileOfKeys) -> None:
    front = start_front(api_keys_file=str(key_file.path), api_key=THREE)
    wanted = {None: False, "wrong": False, f"{ONE},{THREE}": False, ONE: True, TWO: False, THREE: True}
    for key, gets_in in wanted.items():
        assert status_of(front, key) == (200 if gets_in else 401), key
        assert code_of(front, key) is (grpc.StatusCode.OK if gets_in else grpc.StatusCode.UNAUTHENTICATED), key
    key_file.write(TWO)
    assert [status_of(front, key) for key in (ONE, TWO, THREE)] == [401, 200, 200]
    assert code_of(front, ONE) is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(front, TWO) is grpc.StatusCode.OK
    key_file.path.unlink()
    assert [status_of(front, key) for key in (ONE, TWO, THREE, None)] == [401, 401, 200, 401]


def test_operators_hear_of_a_file_that_lets_nobody_in(tmp_path: Path) -> None:
    filed = FileOfKeys(tmp_path / "keys", TWO)
    assert (filed.keys.warning, filed.keys.counts) == ("", {"configured": 1, "file": 1})
    filed.write("# nobody")
    filed.clock.advance(LOOK_S)
    assert filed.keys.warning == f"api_keys_file: {filed.path} holds no key; nobody gets in by it"
    assert filed.keys.counts == {"configured": 1, "file": 0}
    filed.path.unlink()
    filed.clock.advance(LOOK_S)
    assert "cannot be read (No such file or directory); nobody gets in by it" in filed.keys.warning
    filed.write(THREE)
    filed.clock.advance(LOOK_S)
    assert (filed.keys.warning, filed.keys.counts) == ("", {"configured": 1, "file": 1})


def test_a_revoked_key_ends_no_stream_under_way(start_front: Callable[..., Any], key_file: FileOfKeys) -> None:
    front = start_front(api_keys_file=str(key_file.path))
    front.service.hang_at = 3
    headers = {"authorization": f"Bearer {ONE}"}
    with httpx.stream("POST", f"{front.url}{CHAT}", json={**BODY, "stream": True}, headers=headers) as answer:
        assert answer.status_code == 200
        assert front.service.hanging.wait(20)
        key_file.write(TWO)
        assert status_of(front, ONE) == 401
        assert front.service.running == 1
    assert front.service.canceled.wait(20)


IDLE = {"requests_inside": 0, "choices_waiting": {}}


def test_strangers_learn_whether_it_is_ready_and_nothing_else(start_front: Callable[..., Any]) -> None:
    front = start_front(api_key=ONE)
    assert httpx.get(f"{front.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{front.url}/ready").json() == {"ready": True}
    front.service.ready = False
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = httpx.get(f"{front.url}/ready", headers=headers)
        assert (answer.status_code, answer.json()) == (503, {"ready": False})
    known = httpx.get(f"{front.url}/ready", headers={"authorization": f"Bearer {ONE}"}).json()
    router = {"pid": os.getpid(), **IDLE, "client_keys": {"configured": 1, "file": None}}
    assert known == {"ready": False, "reason": "no decode worker", "workers": [], "router": router}
