"""What `tandem doctor` makes of what a running cluster says of itself: each check is a pure function from facts to
findings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cli_doctor_checks import Finding, Level
from .cli_status import Samples

FRESH_S = 2.0
PROVEN_S = 120.0
LATE_SHARE = 0.01
KV_SHARE = 0.7
"""Of a machine's memory: weights and everything else want some, too."""
FAILED_SHARE = 0.01

_FALLBACK = "cannot run here"
"""In what `kernels.dispatch` says where it picked something slower than what it was free to pick."""

Worker = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How a running cluster keeps strangers out; known of this user's own clusters only."""

    host: str
    loopback: bool
    api_key: bool
    secret: bool
    tls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What a running cluster says of itself."""

    answer: Mapping[str, Any]
    """Of `/ready`."""
    later: Mapping[str, Any]
    """The same, a moment later."""
    samples: Samples
    cores: int
    memory_bytes: int
    """Of this machine, or of what this process may use of it; 0: unknown."""
    pinned: Mapping[str, Sequence[frozenset[int]]]
    """By worker on this machine: the processors that each of its threads may use."""
    version: str
    """Of this command."""
    security: Security | None
    remote: bool = False
    workers: Sequence[Worker] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "workers", tuple(self.answer.get("workers") or ()))


def check_live(live: Live) -> list[Finding]:
    """Everything that a running cluster shows."""
    if "workers" not in live.answer:
        return [Finding(Level.WARN, "cluster", "it tells nothing without a key", "--api-key, or TANDEM_API_KEY")]
    return [
        _ready(live),
        *_routers(live),
        _lives(live.workers),
        _versions(live),
        _fingerprints(live.workers),
        _heartbeats(live.workers),
        _threads(live),
        _pinning(live),
        _kernels(live.workers),
        _memory(live),
        _ledger(live.workers),
        _stuck(live),
        *_handoffs(live),
        _movers(live.workers),
        _paths(live),
        _late(live.workers),
        *_keys(live),
        *([] if live.security is None else [_security(live.security)]),
    ]


def _ready(live: Live) -> Finding:
    roles = Counter(str(worker["role"]) for worker in live.workers if worker["state"] == "ready")
    text = ", ".join(f"{count} {role}" for role, count in sorted(roles.items())) or "no worker"
    if not live.answer.get("ready"):
        text += f" ready: {live.answer.get('reason')}"
        return Finding(
            Level.FAIL, "cluster", text, "tandem status names each worker's state; serve --verbose its output"
        )
    away = [f"{worker['worker_id']} ({worker['state']})" for worker in live.workers if worker["state"] != "ready"]
    if away:
        return Finding(Level.WARN, "cluster", f"{text} ready; not: {', '.join(away)}", "wait, or tandem restart them")
    return Finding(Level.OK, "cluster", f"{text} ready")


def _routers(live: Live) -> list[Finding]:
    """Of several processes behind one port; a connection reaches any of them."""
    accounts: Sequence[Mapping[str, Any]] = live.answer.get("routers") or ()
    if not accounts:
        return []
    away = [f"{account['process']} ({account.get('reason')})" for account in accounts if not account.get("ready")]
    if away:
        do = "serve restarts those that ended; serve --verbose shows their output"
        return [Finding(Level.WARN, "routers", f"of {len(accounts)} processes, not ready: {', '.join(away)}", do)]
    return [Finding(Level.OK, "routers", f"{len(accounts)} processes behind one port, all ready")]


def _lives(workers: Sequence[Worker]) -> Finding:
    epochs = Counter(str(worker["epoch"]) for worker in workers)
    if any(count > 1 for count in epochs.values()):
        return Finding(Level.FAIL, "epochs", "two workers show the same epoch", "restart both: tandem restart")
    return Finding(Level.OK, "epochs", f"{len(epochs)} workers, each with its own")


def _versions(live: Live) -> Finding:
    found = _by(live.workers, "version")
    if len(found) > 1 or (found and live.version not in found):
        text = f"{_named(found)}; this command: {live.version}"
        return Finding(Level.WARN, "versions", text, "install one version everywhere, then tandem restart --all")
    return Finding(Level.OK, "versions", f"{live.version} everywhere")


def _fingerprints(workers: Sequence[Worker]) -> Finding:
    found = _by(workers, "fingerprint")
    if len(found) > 1:
        do = "only equal ones hand over KV: give all workers the same model, dtype, quantization and KV scales"
        return Finding(Level.FAIL, "fingerprints", _named(found), do)
    return Finding(Level.OK, "fingerprints", f"the same on all workers: {next(iter(found), 'none')[:16]}")


def _heartbeats(workers: Sequence[Worker]) -> Finding:
    late = [w for w in workers if float(w.get("heartbeat_age_s", 0)) > FRESH_S]
    if late:
        text = ", ".join(f"{w['worker_id']} {float(w['heartbeat_age_s']):.1f} s ago" for w in late)
        return Finding(Level.WARN, "heartbeats", text, "stopped, overloaded or unreachable: look at its process")
    return Finding(Level.OK, "heartbeats", "all fresh")


def _threads(live: Live) -> Finding:
    """Of one machine: where workers are elsewhere too, nothing is known of those machines' processors."""
    computing = [worker for worker in live.workers if worker.get("device") != "paced"]
    pinned = Counter(cpu for worker in computing for cpu in worker.get("cpus") or ())
    twice = sorted(cpu for cpu, count in pinned.items() if count > 1)
    if twice:
        text = f"processors {', '.join(map(str, twice))} are given to several workers"
        return Finding(Level.WARN, "threads", text, "engine.cpus: give each pool processors of its own")
    threads = sum(int(worker.get("threads") or 0) * (1 + len(worker.get("other_ranks") or ())) for worker in computing)
    if threads > live.cores and not live.remote:
        text = f"{threads} compute threads on {live.cores} processors"
        return Finding(Level.WARN, "threads", text, "fewer workers, or fewer --threads: they take turns as it is")
    text = f"{threads} compute threads, {live.cores} processors" if computing else "no worker computes"
    return Finding(Level.OK, "threads", text)


def _pinning(live: Live) -> Finding:
    """Whether workers compute where they were told to; of workers whose threads can be looked at."""
    asked = {str(w["worker_id"]): frozenset(w.get("cpus") or ()) for w in live.workers}
    looked_at = [name for name, cpus in asked.items() if cpus and name in live.pinned]
    loose = [name for name in looked_at if asked[name] not in live.pinned[name]]
    if loose:
        text = f"no thread of {', '.join(loose)} keeps to its engine.cpus"
        return Finding(Level.WARN, "pinning", text, "something set their affinity anew: taskset, cgroups")
    text = f"{', '.join(looked_at)} keep to their engine.cpus" if looked_at else "no worker here is given processors"
    return Finding(Level.OK, "pinning", text)


def _kernels(workers: Sequence[Worker]) -> Finding:
    """Who computes and why; of workers on this machine and others."""
    picked = {str(w["worker_id"]): f"{w['kernels']} ({w.get('kernels_reason')})" for w in workers if w.get("kernels")}
    if not picked:
        return Finding(Level.OK, "computed by", "no worker tells")
    found: dict[str, list[str]] = {}
    for name, text in picked.items():
        found.setdefault(text, []).append(name)
    told = "; ".join(f"{text} on {', '.join(names)}" for text, names in found.items())
    if any(_FALLBACK in str(worker.get("kernels_reason")) for worker in workers):
        return Finding(Level.WARN, "computed by", told, "several times slower than the kernels that could not be had")
    return Finding(Level.OK, "computed by", told)


def _memory(live: Live) -> Finding:
    """KV memory beyond what a worker takes at its start is taken as it is filled: what is too much shows under load."""
    kv_bytes = sum(int(worker.get("kv_bytes") or 0) for worker in live.workers)
    text = f"KV of up to {kv_bytes / 2**30:.1f} GiB in all workers"
    if longest := min((int(worker.get("max_model_len") or 0) for worker in live.workers), default=0):
        text += f", contexts of up to {longest} tokens"
    if live.remote or not live.memory_bytes:
        return Finding(Level.OK, "memory", text)
    text += f", {live.memory_bytes / 2**30:.1f} GiB in this machine"
    if kv_bytes > KV_SHARE * live.memory_bytes:
        advice = "a smaller --kv-cache: what is not taken at the start is taken as it is filled"
        return Finding(Level.WARN, "memory", text, advice)
    return Finding(Level.OK, "memory", text)


def _ledger(workers: Sequence[Worker]) -> Finding:
    broken = [str(worker["worker_id"]) for worker in workers if not worker.get("integrity_ok", True)]
    if broken:
        do = "tandem restart them, and report what their log says"
        return Finding(Level.FAIL, "ledger", f"broken on {', '.join(broken)}", do)
    old = [str(w["worker_id"]) for w in workers if float(w.get("integrity_age_s") or 0) > PROVEN_S]
    if old:
        text = f"not proven for over {PROVEN_S:g} s on {', '.join(old)}"
        return Finding(Level.OK, "ledger", f"{text}: it is proven when a worker has nothing to do")
    return Finding(Level.OK, "ledger", "every block accounted for on all workers")


def _stuck(live: Live) -> Finding:
    """Handoffs that stand in the same states, on workers that do nothing meanwhile."""
    later = {worker["worker_id"]: worker for worker in live.later.get("workers") or ()}
    stuck = []
    for worker in live.workers:
        after = later.get(worker["worker_id"])
        if after is None or after["epoch"] != worker["epoch"]:
            continue
        open_handoffs = {**(worker.get("holder_states") or {}), **(worker.get("puller_states") or {})}
        same = all(worker.get(name) == after.get(name) for name in _PROGRESS)
        if open_handoffs and same:
            states = ", ".join(f"{count} {state}" for state, count in sorted(open_handoffs.items()))
            stuck.append(f"{worker['worker_id']}: {states}")
    if stuck:
        do = "leases end them (worker.lease_s); if they come back, look at the other side's log"
        return Finding(Level.WARN, "handoffs", f"not moving: {'; '.join(stuck)}", do)
    return Finding(Level.OK, "handoffs", "none stands still")


_PROGRESS = ("holder_states", "puller_states", "pulls_total", "steps_total", "leases", "pulls")


def _handoffs(live: Live) -> list[Finding]:
    moved = _sum(worker.get("pulls_total") or {} for worker in live.workers)
    failed = _total(live.samples, "tandem:handoff_failures_total", "reason")
    retried = _total(live.samples, "tandem:request_retries_total", "reason")
    text = ", ".join(f"{count:g} by {name}" for name, count in sorted(moved.items())) or "none yet"
    findings = [Finding(Level.OK, "transfers", text)]
    if (
        len(_by(live.workers, "address_host")) <= 1
        and moved.get("grpc", 0) > moved.get("mapped", 0)
        and not live.remote
    ):
        text += "; on one machine mapped memory is faster"
        findings = [Finding(Level.OK, "transfers", text, "--transport auto, unless gRPC was meant")]
    done = _value(live.samples, "tandem:handoffs_total")
    for name, counts in (("handoff failures", failed), ("retries", retried)):
        if not (total := sum(counts.values())):
            continue
        why = ", ".join(f"{reason} {count:g}" for reason, count in sorted(counts.items()))
        level = Level.WARN if total > FAILED_SHARE * (done + total) else Level.OK
        do = "worker_lost: see who died; others: the workers' logs (serve --verbose)" if level is Level.WARN else ""
        findings.append(Finding(level, name, f"{total:g} beside {done:g} handoffs: {why}", do))
    return findings


def _paths(live: Live) -> Finding:
    """A request served without the split that it was meant to have must be visible (DESIGN: What must always hold)."""
    paths = _total(live.samples, "tandem:choices_by_path_total", "path")
    total = sum(paths.values())
    if not total:
        return Finding(Level.OK, "split", "no request finished yet")
    text = ", ".join(f"{name} {count / total:.1%}" for name, count in sorted(paths.items()))
    roles = {str(worker["role"]) for worker in live.workers}
    around = paths.get("local", 0) + paths.get("mixed", 0)
    if {"prefill", "decode"} <= roles and around:
        do = "meant, if local_prefill_threshold is set or mixed workers serve; else a pool was away: metrics, logs"
        return Finding(Level.WARN, "split", f"{text} of {total:g}: {around:g} went round the prefill pool", do)
    return Finding(Level.OK, "split", f"{text} of {total:g} finished")


def _movers(workers: Sequence[Worker]) -> Finding:
    own = sum(1 for worker in workers if worker.get("kv_mover_pid"))
    return Finding(Level.OK, "KV movers", f"{own} of {len(workers)} workers move KV in a process of its own")


def _late(workers: Sequence[Worker]) -> Finding:
    paced = [worker for worker in workers if worker.get("device") == "paced"]
    if not paced:
        return Finding(Level.OK, "device", ", ".join(sorted({str(w.get("device", "?")) for w in workers})) or "none")
    late, steps = (sum(int(worker.get(name) or 0) for worker in paced) for name in ("late_steps_total", "steps_total"))
    text = f"paced (computes nothing); {late} of {steps} steps were late"
    if late > LATE_SHARE * steps:
        do = "times measured on it are the machine's, not the model's: fewer workers, or slower steps"
        return Finding(Level.WARN, "device", text, do)
    return Finding(Level.OK, "device", text)


def _keys(live: Live) -> list[Finding]:
    """Of a router whose clients' keys come from a file: whether it gives any now."""
    counts = (live.answer.get("router") or {}).get("client_keys") or {}
    if counts.get("file") is None:
        return []
    if not counts["file"]:
        do = "write keys into it, one a line; it is read again at once"
        return [Finding(Level.FAIL, "client keys", "api_keys_file gives none: nobody gets in by it", do)]
    return [Finding(Level.OK, "client keys", f"{counts['file']} from api_keys_file")]


def _security(security: Security) -> Finding:
    def yes(has: bool, what: str) -> str:
        return what if has else f"no {what}"

    has = (yes(security.api_key, "client key"), yes(security.secret, "member secret"), yes(security.tls, "TLS"))
    text = f"{security.host}; {', '.join(has)}"
    if security.loopback:
        return Finding(Level.OK, "security", text)
    if not security.api_key or not security.secret:
        return Finding(Level.WARN, "security", text, "whoever reaches it may use it: set a key and a secret")
    if not security.tls:
        return Finding(Level.WARN, "security", text, "keys and answers pass in the clear: --tls-cert, --tls-key")
    return Finding(Level.OK, "security", text)


def _by(workers: Sequence[Worker], name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for worker in workers:
        if name == "address_host":
            value = str(worker.get("address", "")).rpartition(":")[0]
        else:
            value = str(worker.get(name) or "")
        if value:
            found.setdefault(value, []).append(str(worker["worker_id"]))
    return found


def _named(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value[:16]} on {', '.join(names)}" for value, names in found.items())


def _sum(counts: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update({name: int(value) for name, value in count.items()})
    return total


def _total(samples: Samples, name: str, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for labels, value in samples.get(name, ()):
        if value:
            found[labels.get(label, "")] = found.get(labels.get(label, ""), 0.0) + value
    return found


def _value(samples: Samples, name: str) -> float:
    return sum(value for _, value in samples.get(name, ()))
