"""The `tandem` command. Heavy imports wait for the command that needs them, so that `tandem --help` is instant.

Errors are one line on stderr. Exit codes: 0 well, 1 failed, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import cli_serve_options as serving
from .cli_bench import bench
from .cli_bench_serve import join_goodput
from .cli_calibrate import calibrate
from .cli_options import Ca, Key, Url
from .cli_plan import plan
from .cli_profile import profile
from .cli_simulate import simulate
from .cli_typed import as_typed, refused_text
from .launch.local_ray import end_process
from .launch.state import LaunchError

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, whichever click typer carries
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="tandem",
    help="Serve large language models with prefill and decode in separate worker pools.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `tandem` command. Ends the process with the command's exit code."""
    end_process(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code; prints errors, one line each, on stderr."""
    if list(argv) in ([], ["bench"]):
        argv = [*argv, "--help"]
    try:
        result = app(args=join_goodput(argv), prog_name="tandem", standalone_mode=False)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except typer.Abort:
        return _fail("interrupted", 130)
    except _USAGE_ERROR as error:
        return _fail(f"{refused_text(error) or _format(error)} (see --help)", 2)
    except ValueError as error:  # ConfigError and ModelError included: they name field, value and what is allowed
        return _fail(str(error), 2)
    except (LaunchError, OSError) as error:
        from .cli_status import elsewhere

        return _fail(f"{error}{elsewhere(error)}", 1)
    except Exception as error:
        if os.environ.get("TANDEM_TRACEBACK"):
            raise
        return _fail(f"{type(error).__name__}: {error} (TANDEM_TRACEBACK=1 shows where)", 1)
    return result if isinstance(result, int) else 0


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str, code: int) -> int:
    print(f"tandem: {' '.join(message.split())}", file=sys.stderr)
    return code


def _format(error: Exception) -> str:
    return str(getattr(error, "format_message", lambda: error)())


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit(0)


@app.callback()
def _root(
    show: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve large language models with prefill and decode in separate worker pools."""


def version() -> None:
    """Print the version."""
    from .. import __version__

    print(__version__)


@app.command()
def serve(
    context: typer.Context,
    model: serving.Model = None,
    prefill: serving.Prefill = None,
    decode: serving.Decode = None,
    mixed: serving.Mixed = None,
    config: serving.Config = None,
    address: serving.Address = None,
    host: serving.Host = None,
    http_port: serving.HttpPort = None,
    grpc_port: serving.GrpcPort = None,
    registry_port: serving.RegistryPort = None,
    router_processes: serving.RouterProcesses = None,
    device: serving.Device = None,
    dtype: serving.Dtype = None,
    quantization: serving.Quantization = None,
    kv_cache_dtype: serving.KvCacheDtype = None,
    kv_scales: serving.KvScales = None,
    kv_cache: serving.KvCache = None,
    max_model_len: serving.MaxModelLen = None,
    threads: serving.Threads = None,
    transport: serving.Transport = None,
    local_prefill_threshold: serving.LocalPrefillThreshold = None,
    served_model_name: serving.ServedModelName = None,
    events: serving.Events = None,
    drain_timeout: serving.DrainTimeout = None,
    api_key: serving.ApiKey = None,
    api_keys_file: serving.ApiKeysFile = None,
    tls_cert: serving.TlsCert = None,
    tls_key: serving.TlsKey = None,
    insecure: serving.Insecure = False,
    verbose: serving.Verbose = False,
) -> None:
    """Start a cluster and serve until Ctrl-C.

    That drains it: running requests finish. A second one stops at once.
    """
    from .cli_serve import serve as run_serve
    from .config_file import build_config

    given = {path: context.params[name] for name, path in serving.PATHS.items()}
    overrides = {path: value for path, value in given.items() if value is not None and value is not False}
    with as_typed(context, serving.PATHS, config):
        raise typer.Exit(run_serve(build_config(config, overrides), verbose=verbose))


@app.command()
def chat(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and end.")] = None,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that is served.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, tokens.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.", min=0)] = None,
    api_key: Key = None,
    ca: Ca = None,
) -> None:
    """Talk to a running server; without --prompt, line by line."""
    from .cli_chat import ChatOptions
    from .cli_chat import chat as run_chat
    from .cli_status import first_key
    from .tls import ClientTLS

    options = ChatOptions(
        url=url,
        model=model,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        api_key=first_key(api_key),
        tls=ClientTLS.from_environment(ca),
    )
    with as_typed(context):
        raise typer.Exit(run_chat(options, prompt))


@app.command()
def status(
    context: typer.Context,
    url: Url = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="The router's own answer.")] = False,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="Again and again, until Ctrl-C.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Default: this user's own cluster's, else TANDEM_API_KEY.")
    ] = None,
    ca: Ca = None,
) -> None:
    """Show a running cluster's workers, ledger and handoffs.

    Exit code 1 where it is not ready.
    """
    from .cli_status import status as run_status
    from .cli_status import watch as run_watch
    from .tls import ClientTLS

    tls = ClientTLS.from_environment(ca)
    with as_typed(context):
        if watch is not None:
            raise typer.Exit(run_watch(url, watch, api_key=api_key, tls=tls))
        raise typer.Exit(run_status(url, as_json=as_json, api_key=api_key, tls=tls))


@app.command()
def doctor(
    context: typer.Context,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Look at the files of this one.")] = "smollm2-135m",
    as_json: Annotated[bool, typer.Option("--json", help="Every finding as JSON.")] = False,
    api_key: Annotated[
        str | None, typer.Option(help="Default: this user's own cluster's, else TANDEM_API_KEY.")
    ] = None,
    ca: Ca = None,
) -> None:
    """Look at this machine and a running cluster, say what to do.

    Exit code 1 where something is wrong.
    """
    from .cli_doctor import doctor as run_doctor
    from .tls import ClientTLS

    tls = ClientTLS.from_environment(ca)
    with as_typed(context):
        raise typer.Exit(run_doctor(url, model=model, as_json=as_json, api_key=api_key, tls=tls, say=_say))


@app.command()
def restart(
    context: typer.Context,
    workers: Annotated[list[str] | None, typer.Argument(metavar="WORKER", help="As `tandem status` names it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every worker, one after another.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a worker gets to finish what it runs.")] = 30.0,
    url: Url = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(help="Default: this user's own cluster's, else TANDEM_API_KEY.")
    ] = None,
    ca: Ca = None,
) -> None:
    """Drain a worker and start it anew; requests go on.

    Returns when it is ready again.
    """
    from .cli_restart import restart as run_restart
    from .tls import ClientTLS

    tls, names = ClientTLS.from_environment(ca), workers or ()
    with as_typed(context):
        code = run_restart(url, names, every=every, timeout_s=timeout, say=_say, api_key=api_key, tls=tls)
    raise typer.Exit(code)


@app.command()
def demo(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model reference.")] = "smollm2-135m",
    device: Annotated[str, typer.Option(help="cpu or paced.")] = "cpu",
    num_prompts: Annotated[int, typer.Option(help="Requests of the load.", min=1)] = 12,
    request_rate: Annotated[float, typer.Option(help="Requests per second of the load.")] = 1.0,
) -> None:
    """Start a cluster, ask it, load it, show what happened, stop it."""
    from .demo import DemoOptions, run_demo

    with as_typed(context, {"device": "engine.device"}):
        options = DemoOptions(model=model, device=device, num_prompts=num_prompts, request_rate=request_rate)
        raise typer.Exit(run_demo(options))


app.add_typer(bench, name="bench")
app.command("profile")(profile)
app.command("plan")(plan)
app.command("simulate")(simulate)
app.command("calibrate", short_help="Measure and save the scales of int8 and fp8 KV memory.")(calibrate)
app.command("version")(version)

if __name__ == "__main__":
    main()
