"""`tandem serve`: a cluster that stays up until Ctrl-C."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import PurePath

from .cli_display import Display
from .config import ClusterConfig, is_loopback
from .launch.interrupts import Interrupts
from .launch.ray_cluster import Interrupted, Progress, RayCluster
from .launch.stages import describe
from .launch.state import Endpoints, MemberView

_QUESTION = "Why is the sky blue?"
_JSON = "'Content-Type: application/json'"
_LOOK_S = 0.5


def serve(config: ClusterConfig, *, verbose: bool = False) -> int:
    """Runs the cluster and returns the exit code. Raises LaunchError where it cannot start."""
    display = Display()
    display.line(headline(config))
    told = SignalsTold(display)
    with (
        Interrupts(told) as interrupts,
        watched_cluster(config, display, interrupts, verbose=verbose) as cluster,
    ):
        try:
            with display.steps() as progress:
                endpoints = cluster.start(told.follow(progress))
        except Interrupted:
            display.line("stopped before it was ready")
            return 130
        told.ready = True
        display.line(started(cluster.started_s, cluster.members()))
        display.line(welcome(config, endpoints))
        while not interrupts.first.wait(_LOOK_S) and not cluster.ray_lost:
            pass
        if lost := cluster.ray_lost:
            display.line(f"the local Ray died ({lost}); running requests finish, then the cluster ends")
        if not cluster.drain():
            display.line("not everything finished in time")
        lost = cluster.ray_lost
        cluster.stop(at_once=interrupts.second.is_set())
        display.line("ended, because the local Ray died; nothing is left running" if lost else "stopped")
    return 1 if lost else 0


class SignalsTold:
    """What a signal is answered with, by how far the cluster is. Called in the handler with how many have come."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._ray_starts = False
        self.ready = False

    def follow(self, progress: Progress) -> Progress:
        """`progress`, listened to."""

        def heard(who: str, what: str, share: float | None) -> None:
            if who == "ray":
                self._ray_starts = what == "starting"
            progress(who, what, share)

        return heard

    def __call__(self, count: int) -> None:
        if self.ready and count == 1:
            self._display.line("draining: running requests finish; Ctrl-C again stops at once")
        elif self._ray_starts:
            self._display.line("stopping, as soon as Ray has started: that cannot be cut short")
        else:
            self._display.line("stopping" if count == 1 else "stopping at once")


def watched_cluster(
    config: ClusterConfig, display: Display, interrupts: Interrupts, *, verbose: bool = False
) -> RayCluster:
    """A cluster that reports to `display` and listens to `interrupts`."""
    return RayCluster(
        config, report=display.line, interrupted=interrupts.first, hurry=interrupts.second, verbose=verbose
    )


def headline(config: ClusterConfig) -> str:
    """The first line of every run: model, device and pools; a device that computes nothing is named as such."""
    pools = [f"{count} {name}" for name, count in _pools(config) if count]
    if config.router.processes > 1:
        pools.append(f"{config.router.processes} router processes")
    where = "a local Ray" if config.address is None else f"Ray at {config.address}"
    paced = " (computes nothing, takes a model's time)" if config.engine.device == "paced" else ""
    device = f"{config.engine.device}{paced}"
    return f"Tandem: {config.router.model} on {device}, {config.engine.dtype}, {' + '.join(pools)} on {where}"


def started(cluster_s: Mapping[str, float], members: Sequence[MemberView]) -> str:
    """How long it all took, and each member from the birth of its process: that is what a restart takes. Pure."""
    each = (f"  {view.name:<10} {describe(view.state.started_s)}" for view in members if view.state.started_s)
    return "\n".join([f"up after {describe(cluster_s)}", *each])


def welcome(config: ClusterConfig, endpoints: Endpoints) -> str:
    """Endpoints, and lines to copy."""
    model = config.router.served_model_name or config.router.model
    key = config.router.api_key or config.router.api_keys_file
    several = "," in (config.router.api_key or "")
    tls = config.router.tls_cert is not None
    base = f"{'https' if tls else 'http'}://{endpoints.http}"
    messages = [{"role": "user", "content": _QUESTION}]
    chat = json.dumps({"model": model, "messages": messages, "max_tokens": 64, "temperature": 0, "stream": True})
    generate = json.dumps({"chat": {"messages": messages}, "sampling": {"max_tokens": 64, "temperature": 0}})
    shown = "os.environ['TANDEM_API_KEY']" + (".split(',')[0]" if several else "")
    bearer = f' -H "Authorization: Bearer ${{TANDEM_API_KEY{"%%,*" if several else ""}}}"' if key else ""
    grpc_key = f", api_key={shown}" if key else ""
    ca = " --cacert $TANDEM_CA" if tls else ""
    plaintext = "-cacert $TANDEM_CA" if tls else "-plaintext"
    grpc_tls = ", tls=ClientTLS.from_environment()" if tls else ""
    imports = "import os; " if key else ""
    openai_key = shown if key else "'none'"
    grpc_line = (
        f"{imports}from tandem.router.client import {'ClientTLS, ' if tls else ''}TandemClient; "
        f"print(TandemClient({endpoints.grpc!r}{grpc_key}{grpc_tls}).generate("
        f"messages={messages!r}, max_tokens=64, temperature=0).collect().text)"
    )
    openai_line = (
        f"{imports}from openai import OpenAI; "
        f"print(OpenAI(base_url={base + '/v1'!r}, api_key={openai_key}).chat.completions.create(model={model!r}, "
        f"messages={messages!r}, max_tokens=64, temperature=0).choices[0].message.content)"
    )
    python, trust = shlex.quote(sys.executable), "SSL_CERT_FILE=$TANDEM_CA " if tls else ""
    return "\n".join(
        [
            *_warnings(config),
            "ready",
            f"  HTTP     {base}   (metrics: {base}/metrics)",
            f"  gRPC     {endpoints.grpc}",
            "",
            f"  curl -N{ca} {base}/v1/chat/completions -H {_JSON}{bearer} -d {shlex.quote(chat)}",
            f"  grpcurl {plaintext}{bearer} -d {shlex.quote(generate)} {endpoints.grpc} tandem.v1.Tandem/Generate",
            f"  {python} -c {_quote(grpc_line)}",
            *([f"  {trust}{python} -c {_quote(openai_line)}"] if find_spec("openai") else []),
            f"  {tandem_command()} chat --url {base}",
            "",
            "Ctrl-C drains and stops.",
        ]
    )


def tandem_command() -> str:
    """`tandem` as it was started, quoted for a shell: it need not be on the PATH."""
    if PurePath(sys.argv[0]).name == "tandem":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m tandem.cluster.cli"


def _warnings(config: ClusterConfig) -> list[str]:
    """What a user should know before others can reach the cluster."""
    router, lines = config.router, []
    if not is_loopback(router.host):
        if not (router.api_key or router.api_keys_file or router.tls_client_ca):
            lines.append(f"warning: everybody who reaches {router.host} may use this cluster (--insecure)")
        elif router.tls_cert is None:
            lines.append(f"warning: keys and prompts pass in the clear on {router.host}; --tls-cert, --tls-key")
    hosts = sorted({host for host in (router.host, config.worker.host) if not is_loopback(host)})
    if hosts and config.security.tls_cert is None:
        on = " and ".join(hosts)
        lines.append(f"warning: the members' secret and KV pass in the clear on {on}; security.tls_cert and its kin")
    return lines


def _quote(code: str) -> str:
    """Double quotes around Python code that has single ones only: readable, and safe in a shell."""
    escaped = code.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
    return f'"{escaped}"'


def _pools(config: ClusterConfig) -> tuple[tuple[str, int], ...]:
    return (("prefill", config.prefill), ("decode", config.decode), ("mixed", config.mixed))
