"""Each check of `tandem doctor`: facts in, findings out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster import cli, cli_doctor
from tandem.cluster.cli_doctor_checks import Finding, Level, Machine, Package, Port, check_machine
from tandem.cluster.cli_doctor_live import Live, Security, check_live
from tandem.cluster.config import SecurityConfig
from tandem.cluster.launch import runtime_file
from tandem.cluster.launch.runtime_file import RunningCluster
from tandem.kernels import dispatch

MACHINE = Machine(
    python="3.11.7",
    python_allowed=">=3.11,<3.14",
    packages=(Package(name="grpcio", allowed="<2,>=1.74", installed="1.76.0"),),
    cores=8,
    cpu_flags=frozenset({"avx2", "avx512f", "avx512_bf16"}),
    memory_bytes=16 * 2**30,
    ray_auth="",
    open_files=20000,
    cache="/c",
    cache_writable=True,
    cache_free_bytes=50 * 2**30,
    ports=(Port(name="http-port", number=8000, holder="free"),),
    kernels="compiled",
    kernels_reason="the widest that znver4 has",
    gpu="no GPU",
    gpu_hint="",
    model="m",
    model_error=None,
    model_here=True,
)


def worker(name: str, role: str, epoch: str, **fields: Any) -> dict[str, Any]:
    return {
        "worker_id": name,
        "role": role,
        "epoch": epoch,
        "state": "ready",
        "address": "127.0.0.1:7",
        "device": "cpu",
        "fingerprint": "f" * 32,
        "version": "1.0",
        "threads": 1,
        "cpus": [],
        "integrity_ok": True,
        "integrity_age_s": 1.0,
        "heartbeat_age_s": 0.1,
        "steps_total": 100,
        "late_steps_total": 0,
        **fields,
    }


def live(*workers: dict[str, Any], **fields: Any) -> Live:
    shown = workers or (worker("prefill-0", "prefill", "a"), worker("decode-0", "decode", "b"))
    answer = {"ready": True, "reason": "", "workers": list(shown)}
    values: dict[str, Any] = {
        "answer": answer,
        "later": answer,
        "samples": {},
        "cores": 8,
        "memory_bytes": 16 * 2**30,
        "pinned": {},
        "version": "1.0",
        "security": None,
    }
    return Live(**(values | fields))


def about(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.about == name and finding.level is not Level.OK)


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


def test_all_is_well() -> None:
    assert levels(check_machine(MACHINE)) == {Level.OK}
    assert levels(check_live(live())) == {Level.OK}


RAY = Package(name="ray", allowed=">=2.49,<3", installed="2.60.0", extra="cluster")


@pytest.mark.parametrize(
    ("changes", "name", "level", "text"),
    [
        ({"python": "3.10.2"}, "python", Level.FAIL, "3.10.2; allowed: >=3.11,<3.14"),
        (
            {"packages": (Package(name="grpcio", allowed=">=1.74", installed="1.60.0"),)},
            "package",
            Level.FAIL,
            "grpcio 1.60.0; allowed: >=1.74",
        ),
        (
            {"packages": (Package(name="grpcio", allowed=">=1", installed=None),)},
            "package",
            Level.FAIL,
            "not installed",
        ),
        (
            {"packages": (Package(name="torch", allowed=">=2.11", installed=None, extra="engine"),)},
            "package",
            Level.WARN,
            "torch is not installed",
        ),
        ({"packages": (RAY,), "ray_auth": "disabled"}, "ray", Level.WARN, "RAY_AUTH_MODE is disabled"),
        ({"packages": (replace(RAY, installed="2.49.1"),)}, "ray", Level.WARN, "2.49.1 knows no tokens"),
        ({"open_files": 256}, "limits", Level.WARN, "256 open files"),
        ({"cache_writable": False}, "cache", Level.FAIL, "cannot be written"),
        ({"cache_free_bytes": 2**20}, "cache", Level.WARN, "0.0 GiB free"),
        ({"kernels": "torch", "kernels_reason": "no numba"}, "kernels", Level.WARN, "torch: no numba"),
        ({"kernels": "", "kernels_reason": "nothing installed"}, "kernels", Level.WARN, "nothing installed"),
        ({"gpu": "torch: no triton", "gpu_hint": "install it"}, "gpu", Level.WARN, "torch: no triton"),
        ({"model_error": "m: truncated", "model_here": False}, "model", Level.FAIL, "m: truncated"),
        ({"ports": (Port(name="grpc-port", number=8001, holder="taken"),)}, "port", Level.WARN, "grpc-port 8001"),
    ],
)
def test_what_is_wrong_with_a_machine(changes: dict[str, Any], name: str, level: Level, text: str) -> None:
    found = about(check_machine(replace(MACHINE, **changes)), name)
    assert (found.level, text in found.text) == (level, True), found
    assert found.do


T4 = {"name": "Tesla T4", "capability": (7, 5)}
INSTALL = "pip install 'tandem-serve[gpu]'"


@pytest.mark.parametrize(
    ("lacks", "text", "hint"),
    [
        ({}, r"triton: NVIDIA H100, sm_90, .*; \d+ operations in Triton, for engine.device: cuda", ""),
        (T4, "torch: Triton .* Tesla T4 is sm_75, .*; decode steps are not captured; torch's operations, for", ""),
        ({"triton": "3.3.1"}, "torch: Triton kernels cannot run here: triton 3.3.1 is older than ", INSTALL),
        ({"triton": ""}, "torch: Triton kernels cannot run here: triton is not installed ", INSTALL),
        ({"cuda": "", "name": ""}, "torch 2.11.0 is built without CUDA; ", "make the environment with a torch that is"),
        ({"driver": False, "cuda": "", "name": ""}, "no GPU: ", ""),
    ],
)
def test_who_computes_on_the_gpu_is_said(
    lacks: dict[str, Any], text: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = dispatch.GpuFacts(
        driver=True, torch="2.11.0", cuda="13.0", name="NVIDIA H100", capability=(9, 0), triton="3.6.0"
    )
    monkeypatch.setattr(dispatch, "gpu_facts", lambda: replace(h100, **lacks))
    said, advised = cli_doctor._gpu()
    assert re.match(text, said), said
    assert advised.startswith(hint)
    assert bool(advised) == bool(hint)


P, D = worker("prefill-0", "prefill", "a"), worker("decode-0", "decode", "b")
ANSWER = {"ready": True, "reason": "", "workers": [P, D]}
COMPILED = {"kernels": "compiled", "kernels_reason": "the widest that znver4 has"}
AWAY = {"process": 1, "ready": False, "reason": "it does not answer"}
OPEN = Security(host="0.0.0.0", loopback=False, api_key=False, secret=True, tls=False)
PATHS = {"tandem:choices_by_path_total": [({"path": "split"}, 9.0), ({"path": "local"}, 1.0)]}
LOST = {
    "tandem:handoffs_total": [({}, 10.0)],
    "tandem:handoff_failures_total": [({"reason": "worker_lost"}, 2.0)],
    "tandem:request_retries_total": [({"reason": "expired"}, 3.0)],
}


@pytest.mark.parametrize(
    ("facts", "name", "level", "text"),
    [
        (live(answer={"ready": True}), "cluster", Level.WARN, "without a key"),
        (
            live(answer={"ready": False, "reason": "no decode worker is ready", "workers": [P]}),
            "cluster",
            Level.FAIL,
            "1 prefill ready: no decode worker is ready",
        ),
        (
            live(P, D, D | {"worker_id": "d1", "epoch": "c", "state": "draining"}),
            "cluster",
            Level.WARN,
            "d1 (draining)",
        ),
        (live(P, D | {"epoch": "a"}), "epochs", Level.FAIL, "same epoch"),
        (live(P, D | {"version": "0.9"}), "versions", Level.WARN, "1.0 on prefill-0; 0.9 on decode-0"),
        (live(version="2.0"), "versions", Level.WARN, "this command: 2.0"),
        (live(P, D | {"fingerprint": "other"}), "fingerprints", Level.FAIL, "other on decode-0"),
        (live(P, D | {"heartbeat_age_s": 7.0}), "heartbeats", Level.WARN, "decode-0 7.0 s ago"),
        (live(P, D, cores=1), "threads", Level.WARN, "2 compute threads on 1 processors"),
        (
            live(P, D | {"other_ranks": [{"pid": 3}]}, cores=2),
            "threads",
            Level.WARN,
            "3 compute threads on 2 processors",
        ),
        (
            live(
                P | COMPILED, D | {"kernels": "torch", "kernels_reason": "compiled kernels cannot run here: no numba"}
            ),
            "computed by",
            Level.WARN,
            "compiled (the widest that znver4 has) on prefill-0; torch (compiled kernels cannot run here: no numba) on",
        ),
        (live(P | {"cpus": [0, 1]}, D | {"cpus": [1, 2]}), "threads", Level.WARN, "processors 1 are given"),
        (
            live(P, D | {"cpus": [0, 1]}, pinned={"decode-0": [frozenset(range(8))] * 3}),
            "pinning",
            Level.WARN,
            "no thread of decode-0",
        ),
        (
            live(P | {"kv_bytes": 6 * 2**30}, D | {"kv_bytes": 6 * 2**30}),
            "memory",
            Level.WARN,
            "up to 12.0 GiB in all workers, 16.0 GiB",
        ),
        (live(P, D | {"integrity_ok": False}), "ledger", Level.FAIL, "broken on decode-0"),
        (live(P, D | {"puller_states": {"pulling": 2}}), "handoffs", Level.WARN, "decode-0: 2 pulling"),
        (live(samples=LOST), "handoff failures", Level.WARN, "2 beside 10 handoffs: worker_lost 2"),
        (live(samples=LOST), "retries", Level.WARN, "expired 3"),
        (live(samples=PATHS), "split", Level.WARN, "local 10.0%, split 90.0% of 10: 1 went round"),
        (
            live(P | {"device": "paced", "late_steps_total": 50}, D | {"device": "paced"}),
            "device",
            Level.WARN,
            "50 of 200 steps were late",
        ),
        (
            live(answer=ANSWER | {"routers": [{"process": 0, "ready": True}, AWAY]}),
            "routers",
            Level.WARN,
            "of 2 processes, not ready: 1 (it does not answer)",
        ),
        (
            live(answer=ANSWER | {"router": {"pid": 1, "client_keys": {"configured": 1, "file": 0}}}),
            "client keys",
            Level.FAIL,
            "api_keys_file gives none",
        ),
        (live(security=OPEN), "security", Level.WARN, "no client key, member secret, no TLS"),
        (live(security=replace(OPEN, api_key=True)), "security", Level.WARN, "no TLS"),
    ],
)
def test_what_is_wrong_with_a_cluster(facts: Live, name: str, level: Level, text: str) -> None:
    found = about(check_live(facts), name)
    assert (found.level, text in found.text) == (level, True), found
    assert found.do


@pytest.mark.parametrize(
    ("opened", "text"),
    [
        ({}, "no client key, member secret, no TLS"),
        ({"api_key": "k" * 16, "tls": True}, "client key, member secret, TLS"),
    ],
)
def test_doors_are_judged_by_what_they_are_bound_to(
    opened: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    secret = SecurityConfig(secret="s" * 32)
    runtime_file.write(
        RunningCluster(
            http="127.0.0.1:7", grpc="127.0.0.1:8", registry="127.0.0.1:9", host="0.0.0.0", security=secret, **opened
        )
    )
    security = cli_doctor._security("http://127.0.0.1:7")
    [found] = [finding for finding in check_live(live(security=security)) if finding.about == "security"]
    assert found.text == f"0.0.0.0; {text}"
    assert found.level is (Level.OK if opened else Level.WARN)
    assert ("whoever reaches it may use it" in found.do) is not bool(opened)


def test_handoffs_that_move_are_not_stuck() -> None:
    before, after = D | {"puller_states": {"pulling": 2}}, D | {"puller_states": {"pulling": 2}, "steps_total": 101}
    facts = live(P, before, later={"ready": True, "workers": [P, after]})
    assert levels(check_live(facts)) == {Level.OK}


def test_loopback_needs_no_key_and_a_mixed_cluster_is_no_bypass() -> None:
    facts = live(worker("mixed-0", "mixed", "a"), samples=PATHS, security=replace(OPEN, host="::1", loopback=True))
    assert levels(check_live(facts)) == {Level.OK}


def test_what_is_fine() -> None:
    def said(findings: list[Finding], name: str) -> str:
        return next(f.text for f in findings if f.about == name and f.level is Level.OK)

    assert said(check_machine(MACHINE), "processor").endswith("avx2, avx512f, avx512_bf16")
    assert said(check_machine(MACHINE), "kernels") == "compiled: the widest that znver4 has"
    assert "wants a token" in said(check_machine(replace(MACHINE, packages=(RAY,))), "ray")
    kept = live(P, D | {"cpus": [0, 1]}, pinned={"decode-0": [frozenset(range(8)), frozenset({0, 1})]})
    assert said(check_live(kept), "pinning") == "decode-0 keep to their engine.cpus"
    assert said(check_live(live(D | {"cpus": [0]})), "pinning").startswith("no worker"), "it cannot be looked at"
    pair = live(answer=ANSWER | {"routers": [{"process": index, "ready": True} for index in range(2)]})
    assert said(check_live(pair), "routers") == "2 processes behind one port, all ready"
    both = live(P | {"max_model_len": 2048}, D | {"max_model_len": 512})
    assert "contexts of up to 512 tokens" in said(check_live(both), "memory")
    much = live(P | {"kv_bytes": 2**40}, remote=True)
    assert said(check_live(much), "memory") == "KV of up to 1024.0 GiB in all workers"


def test_without_a_cluster_it_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    assert cli_doctor.doctor("http://127.0.0.1:1", model="dummy:tiny-llama", say=said.append) == 0
    assert "no router answers" in "\n".join(said)
    said.clear()
    assert cli_doctor.doctor("http://127.0.0.1:1", model="dummy:nothing", as_json=True, say=said.append) == 1
    [failed] = [finding for finding in json.loads(said[0]) if finding["level"] == "fail"]
    assert failed["about"] == "model"
    with pytest.raises(ValueError, match="url"):
        cli_doctor.doctor("nowhere", say=said.append)


def test_this_users_other_cluster_is_named_and_its_ports_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runtime_file.write(RunningCluster(http="127.0.0.1:2", grpc="127.0.0.1:3", registry="127.0.0.1:4"))
    said: list[str] = []
    assert cli_doctor.doctor("http://127.0.0.1:1", model="dummy:tiny-llama", say=said.append) == 0
    assert "this user's running cluster: http://127.0.0.1:2" in "\n".join(said)
    for command in (["status"], ["restart", "--all"], ["chat", "--prompt", "x"], ["bench", "serve"]):
        assert cli.run([*command, "--url", "http://127.0.0.1:1"]) == 1
        assert capsys.readouterr().err.endswith("; this user's running cluster: http://127.0.0.1:2\n")
    assert cli.run(["status", "--url", "http://127.0.0.1:2"]) == 1
    assert "running cluster" not in capsys.readouterr().err, "it is the one that does not answer"
    ports = cli_doctor._ports("http://127.0.0.1:2")
    assert [(port.name, port.number, port.holder) for port in ports] == [
        ("http-port", 2, "ours"),
        ("grpc-port", 3, "ours"),
        ("registry-port", 4, "ours"),
    ]
