"""A worker's last heartbeat as plain values, for `/ready`: what `tandem status` and `tandem doctor` read. Pure."""

from __future__ import annotations

from ..cluster.proto import tandem_internal_v1_pb2 as pb

_AS_IT_IS = (
    *("worker_id", "role", "role_version", "address", "kv_address", "device", "model", "fingerprint", "version", "pid"),
    *("max_model_len", "block_size", "num_blocks", "free_blocks", "cached_blocks", "credited_blocks"),
    *("credit_limit_blocks", "running", "waiting", "held", "max_running", "max_waiting", "streams", "leases", "pulls"),
    *("integrity_ok", "integrity_age_s", "preemptions_total", "steps_total", "late_steps_total", "threads", "kv_bytes"),
    *("kv_mover_pid", "max_batched_tokens", "kernels", "kernels_reason", "tensor_parallel", "pipeline_stages"),
    "kv_dtype",
)
_BY_NAME = ("holder_states", "puller_states", "pulls_total", "handoff_failures_total")


def describe(status: pb.WorkerStatus) -> dict[str, object]:
    """Numbers as they came; the epoch in hexadecimal, because JSON's readers round large numbers."""
    values: dict[str, object] = {name: getattr(status, name) for name in _AS_IT_IS}
    values["epoch"] = f"{status.epoch:016x}"
    values["cpus"] = list(status.cpus)
    values["other_ranks"] = [{"pid": rank.pid, "host": rank.host} for rank in status.other_ranks]
    for name in _BY_NAME:
        values[name] = dict(sorted(getattr(status, name).items()))
    return values
