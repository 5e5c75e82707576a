"""What lies next to a candidate: a worker more or less of a role, other limits of a batch, another chunk. Pure."""

from __future__ import annotations

from dataclasses import replace

from ..types import Role
from .place import why_not
from .result import Affinity, Candidate, Pool
from .setting import Setting

MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 128, 16_384
MIN_RUNNING, MAX_RUNNING = 8, 1024


def neighbors(setting: Setting, candidate: Candidate) -> list[Candidate]:
    """All that can run here, one change away; a worker may also change its role."""
    step = candidate.cells
    found: list[Candidate] = []
    if candidate.disaggregated:
        prefill, decode = candidate.pools
        moves = [(1, 0), (0, 1), (-1, 0), (0, -1), (1, -1), (-1, 1)]
        for more, other in moves:
            counted = _counted(prefill, more * step), _counted(decode, other * step)
            if min(pool.count for pool in counted) >= step:
                found.append(replace(candidate, pools=counted))
    for place, pool in enumerate(candidate.pools):
        for changed in _limits(pool):
            pools = tuple(changed if index == place else one for index, one in enumerate(candidate.pools))
            found.append(replace(candidate, pools=pools))
    origin = candidate.affinity if candidate.affinity is not Affinity.HIGH else Affinity.NEIGHBOR
    found = [replace(one, affinity=origin) for one in found if one.gpus <= setting.gpus and _holds(setting, one)]
    return [one for one in found if not why_not(setting, one)]


def _counted(pool: Pool, more: int) -> Pool:
    return replace(pool, count=pool.count + more)


def _limits(pool: Pool) -> list[Pool]:
    """Half and twice the token budget, half and twice the rows; a decode worker's budget is its rows'."""
    found = []
    if pool.role is not Role.DECODE:
        for budget in (pool.max_batched_tokens // 2, pool.max_batched_tokens * 2):
            if MIN_BATCHED_TOKENS <= budget <= MAX_BATCHED_TOKENS:
                found.append(replace(pool, max_batched_tokens=budget))
    if pool.role is not Role.PREFILL:
        for rows in (pool.max_running // 2, pool.max_running * 2):
            if MIN_RUNNING <= rows <= MAX_RUNNING:
                found.append(replace(pool, max_running=rows))
    return found


def _holds(setting: Setting, candidate: Candidate) -> bool:
    """Whether the stages of a cell still share nodes."""
    if candidate.affinity is not Affinity.LOW:
        return True
    stages = candidate.pools[0].pipeline_stages
    segment = sum(pool.tensor_parallel * pool.count // candidate.cells for pool in candidate.pools)
    return candidate.cells <= (setting.gpus_per_node // segment) * setting.nodes // stages if segment else False


def one_more(candidate: Candidate, role: Role) -> Candidate | None:
    """With a worker more of that role, in every cell; None: it has no such pool."""
    if candidate.pool(role) is None:
        return None
    step = candidate.cells
    pools = tuple(_counted(pool, step) if pool.role is role else pool for pool in candidate.pools)
    return replace(candidate, pools=pools)
