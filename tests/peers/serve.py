"""vLLM's server and ours on the same cores under the same promises: the highest rate that each of them keeps.

    make peers-served                      # vLLM in its forms, ours split and mixed: about an hour
    .venv/bin/python tests/peers/serve.py --only 'tandem mixed bf16','vllm fp32' --sweep-duration 30
    .venv/bin/python tests/peers/serve.py … --save-result served.json --resume     # goes on after an interruption

One server after the other, pinned to the same cores as the client (`tandem bench serve`). Of each: seconds from the
start of its process until it says that it is ready, the first time and once its caches are warm; TTFT and TPOT of
requests that are alone; resident memory of all its processes after the load (shared pages counted once: PSS); and by
`--sweep` the highest rate at which 90 % of the requests keep both promises, over at least three seeds. Prompts are
random and never the same twice, so prefix caches, which both servers leave on, find nothing. A server that does not
come up stands in the table with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # a script of its own, not part of a package

import peer_models
import yaml
from contenders import vllm_environment
from peer_runner import has_bfloat16
from peer_venvs import PeerUnavailable, default_root, prepare
from tandem.cluster.models.reference import resolve_model

READY_TIMEOUT_S = 600.0
PORTS = (20_000, 30_000)
STOP_TIMEOUT_S = 60.0
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "w8a8": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Server:
    """One server in one form."""

    engine: str
    """`tandem split` (a prefill and a decode worker), `tandem mixed` (one worker with all cores), or `vllm`."""
    form: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.engine} {self.form}"


SERVERS = (
    Server("tandem split", "bf16"),
    Server("tandem mixed", "bf16"),
    Server("vllm", "bf16"),
    Server("vllm", "fp32"),
    Server("tandem split", "w8a8"),
    Server("tandem mixed", "w8a8"),
    Server("vllm", "w8a8"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each server; 0 if one of ours was."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    options = parse(argv)
    cores = tuple(sorted(os.sched_getaffinity(0)))[: options.cores]
    os.sched_setaffinity(0, cores)
    rows = kept(options)
    for server in SERVERS:
        if (options.only and server.name not in options.only) or any(row["server"] == server.name for row in rows):
            continue
        print(f"{server.name} on cores {','.join(map(str, cores))}", flush=True)
        try:
            rows.append({"server": server.name, **measure(server, options, cores)})
        except (PeerUnavailable, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"  cannot be measured: {error}", flush=True)
            rows.append({"server": server.name, "error": str(error)})
        save(rows, options)
    print(table(rows, options))
    if options.save_result:
        print(f"saved {options.save_result}")
    return 0 if any("error" not in row and row["server"].startswith("tandem") for row in rows) else 1


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """With `--resume`, the servers that an interrupted run has measured under the same load."""
    if not (options.resume and options.save_result and Path(options.save_result).exists()):
        return []
    saved = json.loads(Path(options.save_result).read_text(encoding="utf-8"))
    if saved.get("load") != load_of(options):
        raise SystemExit(f"--resume: {options.save_result} has another load, {saved.get('load')}")
    return [row for row in saved["rows"] if "error" not in row]


def load_of(options: argparse.Namespace) -> dict[str, Any]:
    """What two servers must share to be compared."""
    names = ("model", "cores", "input_len", "output_len", "ttft_ms", "tpot_ms", "seeds", "seed", "sweep_duration")
    names += ("vllm_args",)
    return {name: getattr(options, name) for name in names}


def save(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes all that was measured so far, whole or not at all."""
    if not options.save_result:
        return
    facts = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "argv": sys.argv[1:]}
    target = Path(options.save_result)
    partial = target.with_name(f"{target.name}.partial")
    text = json.dumps({**facts, "load": load_of(options), "rows": list(rows)}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(target)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="an alias or a GGUF file, of a llama model")
    parser.add_argument("--only", type=names, default=(), help=f"of: {', '.join(one.name for one in SERVERS)}")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--ttft-ms", type=float, default=1500.0)
    parser.add_argument("--tpot-ms", type=float, default=100.0)
    parser.add_argument("--alone", type=int, default=8, help="requests one after the other")
    parser.add_argument("--start-rate", type=float, default=1.0, help="requests per second at which the search begins")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep-duration", type=float, default=40.0, help="seconds that each run sends")
    parser.add_argument("--sweep-rates", help="measure these, comma-separated, in place of a search")
    parser.add_argument("--sweep-resolution", type=float, default=0.05, help="gap between kept and failed that ends it")
    parser.add_argument("--sweep-timeout", type=float, default=900.0, help="seconds of a server's search at most")
    parser.add_argument("--vllm-args", default="", help="more for its server, e.g. --vllm-args=--enforce-eager")
    parser.add_argument("--root", type=Path, default=default_root(), help="where environments and models are kept")
    parser.add_argument("--save-result", metavar="FILE", help="written after every server")
    parser.add_argument("--resume", action="store_true", help="servers that the saved result has are not run again")
    return parser.parse_args(argv)


def names(text: str) -> tuple[str, ...]:
    """Comma-separated servers."""
    found, allowed = tuple(part.strip() for part in text.split(",")), [server.name for server in SERVERS]
    for name in found:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is not allowed; allowed: {', '.join(allowed)}")
    return found


def measure(server: Server, options: argparse.Namespace, cores: tuple[int, ...]) -> dict[str, Any]:
    """Starts one server twice, as what it compiles or packs the first time is kept, measures the second, stops it."""
    with tempfile.TemporaryDirectory(prefix="tandem-peers-") as folder:
        with started(server, options, cores, Path(folder)) as (_, _, first_ready_s):
            print(f"  ready after {first_ready_s:.1f} s the first time", flush=True)
        with started(server, options, cores, Path(folder)) as (pid, client, ready_s):
            found: dict[str, Any] = {"first_ready_s": first_ready_s, "ready_s": ready_s}
            print(f"  ready after {ready_s:.1f} s", flush=True)
            alone = ("--num-prompts", str(options.alone), "--max-concurrency", "1")
            unloaded = client.run("alone", *alone, seed=options.seed + 91_000)
            found |= {name: unloaded[name] for name in ("median_ttft_ms", "median_tpot_ms")}
            print(f"  alone: {found['median_ttft_ms']:.0f} ms, {found['median_tpot_ms']:.1f} ms", flush=True)
            found["sweep"] = client.sweep(options)
            found["best_rate"] = found["sweep"]["best_rate"]
            found["memory_bytes"] = memory_bytes(pid)
            for point in found["sweep"]["points"]:
                print(f"  {point['rate']:g}/s: {point['attainment']:.1%} kept their promises", flush=True)
            print(f"  keeps {found['best_rate']} requests/s", flush=True)
            return found


@contextlib.contextmanager
def started(
    server: Server, options: argparse.Namespace, cores: tuple[int, ...], folder: Path
) -> Iterator[tuple[int, Client, float]]:
    """(process id, client, seconds until it was ready) of a server that runs until the end."""
    command, environment, port = prepared(server, options, cores, folder)
    log = options.root / f"served-{server.name.replace(' ', '-')}.log"
    client = Client(port, options, resolve_model(options.model).config.vocab_size, folder)
    began = time.monotonic()
    with running(command, environment, log) as process:
        wait_ready(process, port, "/health" if server.engine == "vllm" else "/ready", log)
        ready_s = time.monotonic() - began
        client.run("first", "--num-prompts", "1", "--max-concurrency", "1", seed=options.seed + 90_000)
        yield process.pid, client, ready_s


def prepared(
    server: Server, options: argparse.Namespace, cores: tuple[int, ...], folder: Path
) -> tuple[list[str], dict[str, str], int]:
    """(command, environment, HTTP port) of a server. Makes environments and models where they are not there yet."""
    ports = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    int8 = server.engine == "vllm" and server.form == "w8a8"
    model = peer_models.folder(options.model, options.root / "models", int8=int8)
    if server.engine != "vllm":
        config = folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(tandem_config(server, str(model), cores, ports)), encoding="utf-8")
        return [sys.executable, "-m", "tandem.cluster.cli", "serve", "--config", str(config)], environment, ports[0]
    venv = prepare("vllm", options.root)
    environment |= vllm_environment(venv, cores)
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "PYTHONPATH": str(stub(options.root))}
    # What this version compiles ahead of time it cannot load again, and compiles once more at every start.
    environment |= {"VLLM_USE_AOT_COMPILE": "0"}
    longest = options.input_len + options.output_len + 64
    command = [str(venv.python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += [
        "--port",
        str(ports[0]),
        "--model",
        str(model),
        "--dtype",
        "float32" if int8 and not has_bfloat16() else DTYPES[server.form],
    ]
    return [*command, "--max-model-len", str(longest), *options.vllm_args.split()], environment, ports[0]


def tandem_config(server: Server, model: str, cores: tuple[int, ...], ports: list[int]) -> dict[str, Any]:
    """Our cluster: two workers with a core each, or one with all."""
    split = server.engine == "tandem split"
    engine = {
        "model": model,
        "dtype": DTYPES[server.form],
        "quantization": "w8a8" if server.form == "w8a8" else None,
        "threads": 1 if split else len(cores),
    }
    workers = {"prefill": 1, "decode": 1} if split else {"prefill": 0, "decode": 0, "mixed": 1}
    return {
        "engine": engine,
        "router": {"model": model, **dict(zip(("http_port", "grpc_port", "registry_port"), ports, strict=True))},
        "start_timeout_s": READY_TIMEOUT_S,
        **workers,
    }


def stub(root: Path) -> Path:
    """A folder for PYTHONPATH that says which version of `vllm` there is: its CPU package goes by another name, and
    the server looks itself up by this one, and for the `cpu` in its version.
    """
    folder = root / "stub"
    facts = folder / "vllm-0.32.0+cpu.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n", encoding="utf-8")
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below those that the kernel hands out: nobody gets them until the server has them."""
    found: list[int] = []
    for port in random.sample(range(*PORTS), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports in {PORTS[0]}…{PORTS[1]}")


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a session of its own, asked to stop at the end, and killed with all its processes where it stays."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        finally:  # told to stop a second time while it waits, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_ready(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    """Until the server answers at `path` that it takes requests. PeerUnavailable where it ends or takes too long."""
    until = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing")
            raise PeerUnavailable(f"ended with {process.returncode}: {said.strip()[-300:]}")
        if _answers(port, path):
            return
        time.sleep(0.1)
    raise PeerUnavailable(f"not ready after {READY_TIMEOUT_S:g} s")


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Client:
    """`tandem bench serve` against one server, its results in a folder."""

    def __init__(self, port: int, options: argparse.Namespace, vocab_size: int, folder: Path) -> None:
        self._folder = folder
        self._common = [sys.executable, "-m", "tandem.cluster.cli", "bench", "serve"]
        self._common += ["--base-url", f"http://127.0.0.1:{port}", "--dataset-name", "random"]
        self._common += ["--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len)]
        self._common += ["--vocab-size", str(vocab_size), "--temperature", "0"]

    def run(self, name: str, *flags: str, seed: int, timeout_s: float = 600.0) -> dict[str, Any]:
        """One run; its saved result. OSError with the client's last words where there is none."""
        target = self._folder / f"{name}.json"
        saving = ["--save-result", "--result-filename", str(target), "--seed", str(seed)]
        done = subprocess.run(
            [*self._common, *flags, *saving], capture_output=True, text=True, timeout=timeout_s, cwd=self._folder
        )
        if not target.is_file():
            raise OSError(f"the client failed: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return found

    def sweep(self, options: argparse.Namespace) -> dict[str, Any]:
        """The search for the highest rate at 90 %."""
        promises = ["--goodput", f"ttft:{options.ttft_ms:g}", f"tpot:{options.tpot_ms:g}"]
        search = ["--sweep", "--request-rate", str(options.start_rate), "--sweep-seeds", str(options.seeds)]
        search += ["--sweep-resolution", str(options.sweep_resolution)]
        if options.sweep_rates:
            search += ["--sweep-rates", options.sweep_rates]
        bounds = ["--sweep-duration", str(options.sweep_duration), "--sweep-timeout", str(options.sweep_timeout)]
        limit_s = options.sweep_timeout + 1200
        return self.run("sweep", *promises, *search, *bounds, seed=options.seed, timeout_s=limit_s)


def memory_bytes(pid: int) -> int:
    """Proportional share of memory of all processes of a server's session, Ray's included."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, StopIteration):
            if os.getsid(int(folder.name)) == pid or _descends(int(folder.name), pid):
                lines = (folder / "smaps_rollup").read_text(encoding="ascii").splitlines()
                total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        pid = int(text.rpartition(")")[2].split()[1])
    return pid == ancestor


def table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """One line a server."""
    lines = [
        f"\n{options.input_len} in, {options.output_len} out, random; TTFT {options.ttft_ms:g} ms and "
        f"TPOT {options.tpot_ms:g} ms for 90 %; {options.seeds} seeds; client on the same {options.cores} cores",
        f"{'':<20}{'keeps, req/s':>14}{'alone TTFT ms':>15}{'TPOT ms':>9}{'ready s':>9}{'first':>7}{'memory GiB':>12}",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['server']:<20}  {row['error']}")
            continue
        rate = "below the first" if row["best_rate"] is None else f"{row['best_rate']:.2f}"
        lines.append(
            f"{row['server']:<20}{rate:>14}{row['median_ttft_ms']:>15.0f}{row['median_tpot_ms']:>9.1f}"
            f"{row['ready_s']:>9.1f}{row['first_ready_s']:>7.1f}{row['memory_bytes'] / 2**30:>12.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
