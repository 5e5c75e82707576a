"""The whole cluster on Ray: places members, starts them, watches them, drains them, and leaves nothing behind.

1. `start`: checks what can be checked here (model, ports), then brings up Ray or joins it, books a placement group with
   one bundle for the router's processes and one for each worker, makes the actors and waits until every router says
   that it is ready.
2. While it runs, `cluster.launch.manager` watches.
3. `drain`: the routers admit nothing more and finish what runs; then the workers. Ray is not needed for that: when
   its head or its raylet dies, the members live on for a while.
4. `stop`: members end, actors and placement group go, Ray goes, its folder goes; processes that are left are ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import ClusterConfig, ConfigError, is_loopback, to_dict
from . import runtime_file
from .bundles import bundles_of, check_nodes, room_text, stages_booked
from .checks import (
    check_engines,
    check_events,
    check_memory,
    check_ports,
    check_shared_ports,
    fetch_model,
    pin_config,
    wait_gone,
)
from .local_ray import LocalRay, join_ray, remedy
from .security import secured
from .stages import Stages
from .state import Endpoints, LaunchError, MemberView, Phase

Progress = Callable[[str, str, float | None], None]
"""(member, stage, share done or None), whenever one of them changes."""

_POLL_S = 0.1
_STOP_S = 10.0
_GONE_S = 5.0
_LAST_WORDS_S = 2.0
"""What the router gets, also when everything stops at once, to end its clients' requests with an error."""
_WATCH_ENDS_S = 2.0
_OUTLIVE_S = 60.0
"""Members outlive Ray's head by the time that a drain may take, and by this."""
_WILDCARDS = ("0.0.0.0", "::")


class Interrupted(LaunchError):
    """The start was given up because the caller asked for it."""


class RayCluster:
    """One cluster and the Ray driver behind it. Not thread-safe, except that `hurry` may be set from anywhere.

    `report` is called from the manager's thread and may not block. `interrupted` gives a start up; `hurry` cuts a drain
    short.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        report: Callable[[str], None] | None = None,
        interrupted: threading.Event | None = None,
        hurry: threading.Event | None = None,
        verbose: bool = False,
    ) -> None:
        self._config = config
        self._progress: Progress = lambda member, stage, share: None
        self._line = report or (lambda line: None)
        self._interrupted = interrupted or threading.Event()
        self._hurry = hurry or threading.Event()
        self._verbose = verbose
        self._local: LocalRay | None = None
        self._joined = False
        self._group: Any = None
        self._routers: list[Any] = []
        self._workers: list[Any] = []
        self._manager: Any = None
        self._endpoints: Endpoints | None = None
        self._operator_key: str | None = None
        self._runtime_file: Path | None = None
        self.started_s: Mapping[str, float] = {}
        """What `start` took, stage by stage; that of each member is in its state."""

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _handles(self) -> list[Any]:
        return [*self._routers, *self._workers]

    @property
    def endpoints(self) -> Endpoints:
        """Where clients go; known after `start`."""
        if self._endpoints is None:
            raise LaunchError("the cluster has not been started")
        return self._endpoints

    @property
    def ray_lost(self) -> str:
        """What of the local Ray is gone: `gcs_server`, `raylet` or both; empty: nothing. Without it no member can be
        restarted, and the cluster should be drained and stopped.
        """
        return "" if self._local is None else self._local.lost

    def members(self) -> tuple[MemberView, ...]:
        """The members as last heard of; empty before `start` and after `stop`."""
        return () if self._manager is None else self._manager.views()

    def start(self, progress: Progress | None = None) -> Endpoints:
        """Blocks until a request can be served. Raises LaunchError, or ConfigError for settings that this machine or
        the model cannot fulfill, one line; then nothing is left running.
        """
        self._progress = progress or self._progress
        stages = Stages("checks", age_s=0.0)
        try:
            config = self._prepare()
            stages.enter("Ray")
            self._start_ray(config)
            stages.enter("members")
            self._place(config)
            self._make_members(config)
            self._endpoints = self._wait_ready(config)
            self._tell_operator(config, self._endpoints)
        except BaseException:
            self.stop(at_once=True)
            raise
        from .manager import Manager

        self._manager = Manager(self._handles, self._report)
        self._manager.start()
        self.started_s = stages.end()
        return self._endpoints

    def drain(self, timeout_s: float | None = None) -> bool:
        """Finishes what runs, at most `timeout_s` (None: the config's). True if all of it ended by itself in time."""
        deadline_s = time.monotonic() + (self._config.drain_timeout_s if timeout_s is None else timeout_s)
        self._end_watch()
        if not self._routers or not self._drain_routers(deadline_s):
            return not self._routers
        left_s = max(1.0, deadline_s - time.monotonic())
        done = self._wait_for([handle.begin("drain", left_s) for handle in self._workers], left_s + 2.0)
        return done and time.monotonic() <= deadline_s + 2.0

    def _drain_routers(self, deadline_s: float) -> bool:
        """Calls need neither Ray's head nor, for some seconds, its raylet: they go from process to process."""
        from .handles import answer

        left_s = max(1.0, deadline_s - time.monotonic())
        references = [handle.begin("drain", left_s) for handle in self._routers]
        if not self._wait_for(references, left_s + 2.0):
            return False
        return all(bool(answer(reference)) for reference in references)

    def stop(self, *, at_once: bool = False) -> None:
        """Ends everything; idempotent. `at_once` kills members instead of asking them to stop."""
        if self._runtime_file is not None:
            runtime_file.remove(self._runtime_file)
            self._runtime_file = None
        self._end_watch()
        pids = [handle.state.pid for handle in self._handles if handle.state.pid]
        died = bool(self.ray_lost)
        self._end_members(at_once=died or at_once or self._hurry.is_set())
        self._routers, self._workers = [], []
        self._endpoints = None
        self._leave_ray()
        if self._config.address is None:
            wait_gone(pids, 0.0 if died else _GONE_S)

    def _end_members(self, *, at_once: bool) -> None:
        if at_once:
            serving = [handle for handle in self._routers if handle.state.phase in (Phase.READY, Phase.DRAINING)]
            self._wait_for([handle.begin("stop", 0.0) for handle in serving], _LAST_WORDS_S, heed_hurry=False)
        else:
            self._wait_for([handle.begin("stop", _STOP_S) for handle in self._handles], _STOP_S)
        for handle in self._handles:
            if not self.ray_lost:  # which would wait for it; LocalRay.stop ends them
                handle.kill()

    def _prepare(self) -> ClusterConfig:
        if importlib.util.find_spec("ray") is None:
            raise LaunchError("Ray is not installed; pip install 'tandem-serve[cluster]'")
        secure, self._operator_key = secured(self._config)
        local = self._config.address is None
        if local:
            check_ports(self._config.router)
            check_events(self._config.router)
            files = fetch_model(self._config.engine.model, lambda stage, share: self._progress("model", stage, share))
            check_engines(self._config, files.config)
            check_memory(self._config)
        self._give_up_if_interrupted()
        pinned = pin_config(secure)
        try:
            check_shared_ports(pinned.router)
        except ConfigError as error:
            raise error.under("router") from None
        return pinned

    def _start_ray(self, config: ClusterConfig) -> None:
        try:
            if config.address is None:
                self._progress("ray", "starting", None)
                self._local = LocalRay(
                    math.ceil(sum(bundle["CPU"] for bundle in bundles_of(config))),
                    config.object_store_bytes,
                    outlive_s=config.drain_timeout_s + _OUTLIVE_S,
                    verbose=self._verbose,
                )
                self._local.start()
            else:
                self._progress("ray", f"joining {config.address}", None)
                self._joined = True
                join_ray(config.address, verbose=self._verbose)
        except Exception as error:  # Ray raises what it likes, plain Exception included
            where = "the local Ray" if config.address is None else f"Ray at {config.address}"
            told = f"{where} could not be reached: {' '.join(str(error).split())}"
            raise LaunchError(told + (remedy(told) if config.address is None else "")) from error
        self._progress("ray", "ready", None)
        self._give_up_if_interrupted()

    def _place(self, config: ClusterConfig) -> None:
        """One bundle for the router's processes, which share ports and so a node, and one for each pipeline stage of
        each worker; all on one node while the members listen on loopback only.
        """
        import ray

        check_nodes(config.nodes, [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]])
        bundles = bundles_of(config)
        loopback = is_loopback(config.router.host) or is_loopback(config.worker.host)
        needed = sum(bundle["CPU"] for bundle in bundles)
        total = ray.cluster_resources().get("CPU", 0.0)
        if needed > total + 1e-6:
            raise LaunchError(f"the Ray cluster has {total:g} CPUs, and this placement books {needed:g}")
        self._group = ray.util.placement_group(bundles, strategy="STRICT_PACK" if loopback else "PACK")
        deadline_s = time.monotonic() + config.start_timeout_s
        self._progress("ray", f"booking {room_text(bundles)}", None)
        while not self._group.wait(1.0):
            self._give_up_if_interrupted()
            if time.monotonic() > deadline_s:
                where = "on one node" if loopback else "in all"
                raise LaunchError(
                    f"no room for the placement within {config.start_timeout_s:g} s: {room_text(bundles)} {where}"
                )

    def _make_members(self, config: ClusterConfig) -> None:
        for router in config.router.each_process():
            name = "router" if config.router.processes == 1 else f"router-{router.process}"
            self._routers.append(self._make(name, "router", 0, config.router_cpus, to_dict(router), config))
        host, first = config.router.host, self._routers[0]
        if host in _WILDCARDS:  # workers need an address to call, which only the routers' node knows
            for _ in self._polling([first], config, until=lambda: bool(first.state.host)):
                pass
            host = first.state.host
        registries = [f"{host}:{port}" for port in config.router.registry_ports]
        bundle = 1
        for worker in config.workers(*registries):
            made = self._make(worker.worker_id, worker.role.value, bundle, config.worker_cpus, to_dict(worker), config)
            self._workers.append(made)
            bundle += stages_booked(worker.engine)

    def _make(
        self, name: str, role: str, bundle: int, cpus: float, member: dict[str, Any], config: ClusterConfig
    ) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from .actors import MemberActor
        from .handles import MemberHandle
        from .rank_actors import Booked

        booked = Booked(group=self._group, first_bundle=bundle, cpus=cpus)
        actor = ray.remote(MemberActor).options(
            num_cpus=cpus,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )
        kind = "router" if role == "router" else "worker"
        return MemberHandle(name, role, actor.remote(kind, member, config.start_timeout_s, booked))

    def _wait_ready(self, config: ClusterConfig) -> Endpoints:
        shown: dict[str, tuple[str, float | None]] = {}
        handles = self._handles

        def ready() -> bool:
            return all(h.state.phase is Phase.READY and not h.state.not_serving for h in handles)

        for _ in self._polling(handles, config, until=ready):
            for handle in handles:
                now = (handle.state.stage, handle.state.fraction)
                if shown.get(handle.name) != now:
                    shown[handle.name] = now
                    self._progress(handle.name, *now)
        host, addresses = self._routers[0].state.host, self._routers[0].state.addresses
        return Endpoints(
            http=_reachable(addresses["http"], host),
            grpc=_reachable(addresses["grpc"], host),
            registries=tuple(_reachable(router.state.addresses["registry"], host) for router in self._routers),
        )

    def _tell_operator(self, config: ClusterConfig, endpoints: Endpoints) -> None:
        cluster = runtime_file.RunningCluster(
            http=endpoints.http,
            grpc=endpoints.grpc,
            registry=endpoints.registry,
            registries=endpoints.registries,
            host=config.router.host,
            tls=config.router.tls_cert is not None,
            api_key=self._operator_key,
            security=config.security,
        )
        try:
            self._runtime_file = runtime_file.write(cluster)
        except OSError as error:
            self._line(f"tandem restart will not find this cluster's secret ({error})")

    def _polling(self, handles: list[Any], config: ClusterConfig, until: Callable[[], bool]) -> Iterator[None]:
        """Polls the members and yields after every round, the last one too; any failure ends the start."""
        from .handles import poll

        deadline_s = time.monotonic() + config.start_timeout_s
        while True:
            poll(handles, _POLL_S)
            yield
            for handle in handles:
                if handle.state.phase is Phase.FAILED:
                    raise LaunchError(f"{handle.name} could not start: {handle.state.error}")
                if handle.state.phase is Phase.LOST or handle.restarts:
                    raise LaunchError(f"{handle.name} died while it started; --verbose shows its output")
            if until():
                return
            self._give_up_if_interrupted()
            if time.monotonic() > deadline_s:
                late = [f"{h.name} ({h.state.stage})" for h in handles if h.state.phase is not Phase.READY]
                late += [f"{h.name} ({h.state.not_serving})" for h in handles if h.state.not_serving]
                raise LaunchError(f"not ready within {config.start_timeout_s:g} s: {', '.join(late)}")
            time.sleep(_POLL_S)

    def _report(self, line: str) -> None:
        if not self.ray_lost:  # then members are not what is to be reported
            self._line(line)

    def _wait_for(self, references: list[Any], timeout_s: float, *, heed_hurry: bool = True) -> bool:
        from .handles import finished

        deadline_s = time.monotonic() + timeout_s
        while not finished(references, _POLL_S):
            if (heed_hurry and self._hurry.is_set()) or time.monotonic() > deadline_s:
                return False
        return True

    def _give_up_if_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise Interrupted("interrupted while starting")
        if self.ray_lost:
            raise LaunchError("the local Ray died while the cluster started; --verbose shows its output")

    def _end_watch(self) -> None:
        if self._manager is not None:
            self._manager.stop(_WATCH_ENDS_S if self.ray_lost else None)
            self._manager = None

    def _leave_ray(self) -> None:
        if self._local is None and not self._joined:
            return
        import ray

        if self._group is not None and not self.ray_lost:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(self._group)
        self._group = None
        if self._local is not None:
            self._local.stop()
            self._local = None
        elif self._joined:
            ray.shutdown()
            self._joined = False


def _reachable(address: str, node_ip: str) -> str:
    """A wildcard address is nothing that a client can dial; the node's own is."""
    host, _, port = address.rpartition(":")
    return f"{node_ip}:{port}" if host.strip("[]") in _WILDCARDS else address
