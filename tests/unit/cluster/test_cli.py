"""The command line: errors are one line with an exit code, help needs nothing heavy, lines to copy are right."""

import io
import json
import shlex
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tandem.cluster import cli, cli_restart, cli_serve, cli_status
from tandem.cluster.cli_bench_serve import join_goodput
from tandem.cluster.cli_display import Display
from tandem.cluster.config import ClusterConfig
from tandem.cluster.config_file import build_config
from tandem.cluster.launch.state import Endpoints

REFUSED = "no router answers at http://127.0.0.1:1/{} (Connection refused)"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["srve"], 2, "No such command 'srve'"),
        (["serve", "--prefil", "2"], 2, "No such option: --prefil"),
        (["serve", "--prefill", "two"], 2, "--prefill"),
        (["serve", "--decode", "0"], 2, "--decode: 0 is not allowed; allowed: at least 1 where prefill is 1"),
        (["serve", "--device", "tpu"], 2, "--device: 'tpu' is not allowed; allowed: one of cpu, cuda, paced"),
        (["serve", "--kv-cache", "much"], 2, "at least 0, at most 1125899906842624"),
        (["serve", "--config", "/nonexistent.yaml"], 2, "config: '/nonexistent.yaml'"),
        (["chat", "--url", "localhost:8000", "--prompt", "x"], 2, "url: 'localhost:8000'"),
        (["chat", "--max-tokens", "0", "--prompt", "x"], 2, "--max-tokens"),
        (["chat", "--url", "http://127.0.0.1:1", "--prompt", "x"], 1, REFUSED.format("v1/models")),
        (
            ["chat", "--url", "http://127.0.0.1:1", "--model", "m", "--prompt", "x"],
            1,
            REFUSED.format("v1/chat/completions"),
        ),
        (["status", "--url", "nowhere"], 2, "url: 'nowhere'"),
        (["status", "--watch", "0"], 2, "watch: 0 is not allowed"),
        (["restart", "--url", "http://127.0.0.1:1", "decode-0"], 1, REFUSED.format("ready")),
        (["restart"], 2, "worker: name the workers to restart, or --all"),
        (["restart", "--all", "decode-0"], 2, "worker: name the workers to restart, or --all"),
        (["restart", "--all", "--timeout", "-1"], 2, "timeout: -1 is not allowed"),
        (["status", "--url", "http://127.0.0.1:1"], 1, REFUSED.format("ready")),
        (["bench", "serve", "--goodput", "ttft"], 2, "--goodput: 'ttft'"),
        (["bench", "serve", "--goodput", "ttft:1", "itl:3"], 2, "--goodput: 'itl:3'"),
        (["bench", "serve", "--dataset-name", "sonnet"], 2, "--dataset-name: 'sonnet'"),
        (["bench", "serve", "--goodput"], 2, "Option '--goodput' requires an argument"),
        (["bench", "serve", "--sweep"], 2, "--goodput: is missing"),
        (["bench", "serve", "--sweep", "--goodput", "ttft:1", "--sweep-rates", "1;2"], 2, "--sweep-rates: '1;2'"),
        (
            ["bench", "serve", "--random-input-len", "9"],
            2,
            "--random-input-len: has no effect with --dataset-name prompts; allowed with --dataset-name random",
        ),
        (
            ["bench", "serve", "--dataset-name", "random", "--rate-scale", "2"],
            2,
            "--rate-scale: has no effect with --dataset-name random; allowed with --dataset-name trace",
        ),
        (["bench", "serve", "--sweep-seeds", "5"], 2, "--sweep-seeds: has no effect without --sweep"),
        (["bench", "serve", "--extra-body", "[1]"], 2, "--extra-body: '[1]' is not allowed; allowed: a JSON object"),
        (["bench", "serve", "--save-plot", "a.txt"], 2, "--save-plot: 'a.txt' is not allowed"),
        (["bench", "serve", "--save-trace", "/nope/a"], 2, "--save-trace: '/nope/a' is not allowed"),
        (["bench", "serve", "--result-dir", "/nope"], 2, "--result-dir: '/nope' is not allowed"),
        (["bench", "serve", "--server-events", "/"], 2, "--server-events: is not allowed without save_trace"),
        (["bench", "serve", "--metric-percentiles", "p99"], 2, "--metric-percentiles: 'p99'"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:1"], 1, REFUSED.format("v1/models")),
        (
            ["bench", "serve", "--base-url", "http://127.0.0.1:1", "--model", "m", "--request-rate", "0"],
            2,
            "--request-rate: 0.0",
        ),
        (["bench", "swerve"], 2, "No such command 'swerve'"),
    ],
)
def test_errors_are_one_line(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(argv) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("tandem: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out


def test_a_missing_model_and_a_taken_port_are_found_before_ray_starts(capsys: pytest.CaptureFixture[str]) -> None:
    free = ["--http-port", "0", "--grpc-port", "0", "--registry-port", "0"]
    assert cli.run(["serve", "--model", "smolm2-135m", *free]) == 1
    assert "smolm2-135m" in capsys.readouterr().err
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        port = taken.server_address[1]
        assert cli.run(["serve", "--model", "dummy:tiny-llama", *free, "--grpc-port", str(port)]) == 1
    assert f"router.grpc_port: 127.0.0.1:{port} cannot be used" in capsys.readouterr().err
    assert cli.run(["serve", "--model", "dummy:tiny-llama", *free, "--events", "/nonexistent/e.jsonl"]) == 2
    assert "--events: '/nonexistent/e.jsonl' is not allowed" in capsys.readouterr().err
    assert cli.run(["serve", "--model", "dummy:tiny-llama", *free, "--max-model-len", "99999999"]) == 2
    assert "--max-model-len: 99999999 is not allowed; allowed: at most the model's own" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "serve" in capsys.readouterr().out
    assert cli.run(["bench"]) == 0
    assert cli.run(["serve", "--help"]) == 0
    capsys.readouterr()
    assert cli.run(["version"]) == cli.run(["--version"]) == 0
    one, other = capsys.readouterr().out.split()
    assert one == other


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_the_list_of_commands_is_not_cut_off(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*group, "--help"]) == 0
    commands = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert len(commands) > 10
    assert [line for line in commands if not line.endswith(".") or line.endswith("..")] == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from tandem.cluster import cli; cli.run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "ray", "grpc", "numpy", "httpx", "yaml"} & set(done.stderr.split())


def test_goodput_takes_several_values_as_vllm_has_it() -> None:
    argv = ["bench", "serve", "--goodput", "ttft:200", "tpot:50", "--seed", "1"]
    assert join_goodput(argv) == ["bench", "serve", "--goodput", "ttft:200", "--goodput", "tpot:50", "--seed", "1"]


def test_welcome_lines_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    python, command = "/a venv/bin/python", "/a venv/bin/tandem"
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(sys, "argv", [command, "serve"])
    config = build_config(None, {"model": "m", "router.api_key": "k"})
    endpoints = Endpoints(http="127.0.0.1:1", grpc="127.0.0.1:2", registries=("127.0.0.1:3",))
    lines = [line.strip() for line in cli_serve.welcome(config, endpoints).splitlines()]
    by_start = {line.split()[0] + line.split()[1][:2]: shlex.split(line) for line in lines if len(line.split()) > 3}
    curl = by_start["curl-N"]
    assert json.loads(curl[-1])["model"] == "m"
    assert curl[2] == "http://127.0.0.1:1/v1/chat/completions"
    grpcurl = by_start["grpcurl-p"]
    assert grpcurl[-1] == "tandem.v1.Tandem/Generate"
    assert json.loads(grpcurl[grpcurl.index("-d") + 1])["chat"]["messages"][0]["role"] == "user"
    words = [shlex.split(line) for line in lines if line.startswith("'/a venv")]
    assert words[-1] == [command, "chat", "--url", "http://127.0.0.1:1"]
    pythons = [line[2] for line in words if line[:2] == [python, "-c"]]
    assert len(pythons) == 2
    monkeypatch.setattr(sys, "argv", ["/elsewhere/cluster/cli.py", "serve"])
    assert cli_serve.tandem_command() == "'/a venv/bin/python' -m tandem.cluster.cli"
    for code in pythons:
        compile(code, "line", "exec")
        assert "TANDEM_API_KEY" in code
    assert not any("'k'" in line for line in lines)


def test_what_serve_is_told_about_strangers_and_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """By flags, and by the environment where keys shall not stand on a command line."""
    seen: list[ClusterConfig] = []
    monkeypatch.setattr(cli_serve, "serve", lambda config, verbose: seen.append(config) or 0)
    monkeypatch.setenv("TANDEM_API_KEY", "key-of-one-client,key-of-another")
    assert cli.run(["serve"]) == 0
    assert (seen[-1].router.api_key, seen[-1].worker.transport) == ("key-of-one-client,key-of-another", "auto")
    assert cli.run(["serve", "--api-key", "from-the-flag-it-is", "--transport", "mapped", "--insecure"]) == 0
    assert (seen[-1].router.api_key, seen[-1].worker.transport) == ("from-the-flag-it-is", "mapped")
    assert seen[-1].insecure
    assert cli.run(["serve", "--transport", "pigeon"]) == 2
    assert len(seen) == 2


def test_headline_says_what_computes_nothing() -> None:
    assert "computes nothing" in cli_serve.headline(build_config(None, {"engine.device": "paced"}))
    text = cli_serve.headline(build_config(None, {"mixed": 2}))
    assert text == "Tandem: smollm2-135m on cpu, bfloat16, 1 prefill + 1 decode + 2 mixed on a local Ray"


WORKER = {
    "worker_id": "decode-0",
    "role": "decode",
    "epoch": "313c771c7697350b",
    "device": "cpu",
    "model": "m",
    "state": "ready",
    "num_blocks": 200,
    "free_blocks": 100,
    "cached_blocks": 50,
    "running": 3,
    "waiting": 2,
    "held": 1,
    "leases": 4,
}


def test_who_is_restarted() -> None:
    answer = {"ready": True, "workers": [{"worker_id": name} for name in ("prefill-0", "decode-0")]}
    assert cli_restart.chosen(answer, ()) == ["prefill-0", "decode-0"]
    assert cli_restart.chosen(answer, ["decode-0", "decode-0"]) == ["decode-0"]
    with pytest.raises(ValueError, match="worker: 'd' is not allowed; allowed: prefill-0, decode-0"):
        cli_restart.chosen(answer, ["d"])
    with pytest.raises(OSError, match="no worker is up"):
        cli_restart.chosen({"ready": False, "workers": []}, ())
    with pytest.raises(OSError, match="key"):
        cli_restart.chosen({"ready": True}, ())


def test_status_table() -> None:
    lines = cli_status.render("http://h:1", {"ready": True, "reason": "", "workers": [WORKER]}).splitlines()
    assert lines[0] == "http://h:1  ready  m"
    assert lines[2].split() == [
        "worker",
        "role",
        "state",
        "device",
        "epoch",
        "KV",
        "use",
        "running",
        "waiting",
        "held",
        "leases",
    ]
    assert lines[3].split() == [
        "decode-0",
        "decode",
        "ready",
        "cpu",
        "313c771c",
        "25%",
        "of",
        "200",
        "3",
        "2",
        "1",
        "4",
    ]
    worker = WORKER | {"credited_blocks": 7, "credit_limit_blocks": 200, "integrity_ok": True, "integrity_age_s": 3.2}
    worker |= {"pulls": 2, "puller_states": {"pulling": 2}, "pulls_total": {"grpc": 5, "mapped": 9}}
    samples = {
        "tandem:requests_in_flight": [({}, 6.0)],
        "tandem:router_queue_choices": [({"slo_class": "batch"}, 4.0), ({"slo_class": "interactive"}, 0.0)],
    }
    text = cli_status.render("u", {"ready": True, "workers": [worker]}, samples)
    lines = text.splitlines()
    assert lines[1] == "6 requests inside; choices that wait for a worker: batch 4"
    one = cli_status.render("u", {"ready": True, "workers": [worker]}, {"tandem:requests_in_flight": [({}, 1.0)]})
    assert one.splitlines()[1] == "1 request inside"
    assert lines[10].split() == ["decode-0", "50", "50", "100", "7", "of", "200", "3", "s", "ago"]
    assert lines[13].split(maxsplit=4) == [
        "decode-0",
        "4",
        "2",
        "-",
        "pulling 2  grpc 5, mapped 9  -            its loop",
    ]
    moved = cli_status.render("u", {"ready": True, "workers": [worker | {"kv_mover_pid": 42}]}).splitlines()
    assert moved[-1].endswith("process 42")
    samples |= {"tandem:requests_in_flight": [({"router": "0"}, 6.0), ({"router": "1"}, 2.0)]}
    up = {"process": 0, "registry": "h:1", "ready": True, "pid": 7, "requests_inside": 1}
    away = {"process": 1, "registry": "h:2", "ready": False, "reason": "it does not answer"}
    two = cli_status.render("u", {"ready": True, "workers": [worker], "routers": [up, away]}, samples).splitlines()
    assert two[1:4] == [
        "8 requests inside; choices that wait for a worker: batch 4",
        "router 0 (h:1): ready, 1 request inside, pid 7",
        "router 1 (h:2): not ready: it does not answer",
    ]
    assert "BROKEN" in cli_status.render("u", {"ready": True, "workers": [worker | {"integrity_ok": False}]})
    assert "not ready: no prefill" in cli_status.render("u", {"ready": False, "reason": "no prefill", "workers": []})


class _Router(BaseHTTPRequestHandler):
    """Answers as a router that is not ready, and as a chat model that says hello."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        models = {"data": [{"id": "m"}]}
        ready = {"ready": False, "reason": "no decode worker", "workers": [WORKER]}
        self._send(503, ready) if self.path == "/ready" else self._send(200, models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("seed") == 13:
            return self._send(400, {"error": {"message": "seed: 13 is not allowed"}})
        said = f"{len(body['messages'])} messages, "
        pieces = [{"role": "assistant", "content": ""}, {"content": said}, {"content": "hello"}]
        events = [f"data: {json.dumps({'choices': [{'delta': piece}]})}\n\n" for piece in pieces]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write("".join([*events, "data: [DONE]\n\n"]).encode())

    def _send(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def router() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Router) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_status_of_a_router_that_is_not_ready(router: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--url", router]) == 1
    assert "not ready: no decode worker" in capsys.readouterr().out
    assert cli.run(["status", "--url", router, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["workers"][0]["worker_id"] == "decode-0"


def test_chat_once(router: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chat", "--url", router, "--prompt", "hi", "--system", "be brief"]) == 0
    assert capsys.readouterr().out == "2 messages, hello\n"
    assert cli.run(["chat", "--url", router, "--prompt", "hi", "--seed", "13"]) == 1
    assert "HTTP 400: seed: 13 is not allowed" in capsys.readouterr().err


def test_conversation_keeps_its_history(
    router: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/new\nthree\n"))
    assert cli.run(["chat", "--url", router]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 messages, hello", "3 messages, hello", "1 messages, hello"]


def test_logs_have_no_control_characters() -> None:
    stream = io.StringIO()
    display = Display(stream)
    with display.steps() as progress:
        for share in (0.0, 0.1, 0.3, 0.31, 1.0):
            progress("model", "loading", share)
        progress("model", "ready", None)
    display.line("done")
    assert stream.getvalue().splitlines() == [
        "model: loading",
        "model: loading 25%",
        "model: loading 100%",
        "model: ready",
        "done",
    ]


def test_a_log_counts_in_quarters() -> None:
    stream = io.StringIO()
    with Display(stream).count("load", 5) as advance:
        for _ in range(5):
            advance()
    assert stream.getvalue().splitlines() == ["load: done 25%", "load: done 50%", "load: done 75%", "load: done 100%"]


class _Binary(socketserver.BaseRequestHandler):
    """What a gRPC port says to HTTP/1: an HTTP/2 SETTINGS frame."""

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x04\x00\x3f\xff\xff\r\n\r\n")


@pytest.mark.parametrize("argv", [["status"], ["chat", "--prompt", "x"], ["chat", "--prompt", "x", "--model", "m"]])
def test_a_port_that_speaks_no_http_is_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), _Binary) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert cli.run([*argv, "--url", url]) == 1
        thread.join()
    error = capsys.readouterr().err
    assert error.startswith(f"tandem: no router answers at {url}/")
    assert error.endswith("(what listens there does not speak HTTP; is it the gRPC port?)\n")


def test_unexpected_errors_are_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **kwargs: object) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr(cli_status, "status", broken)
    monkeypatch.delenv("TANDEM_TRACEBACK", raising=False)
    assert cli.run(["status"]) == 1
    assert capsys.readouterr().err.startswith("tandem: KeyError: 'surprise'")
