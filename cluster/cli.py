"""The `tandem` command. Heavy imports wait for the command that needs them, so that `tandem --help` is instant.

Errors are one line on stderr. Exit codes: 0 well, 1 failed, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .cli_bench import bench
from .cli_bench_serve import join_goodput
from .cli_calibrate import calibrate
from .cli_options import API_KEY_VARIABLE, Ca, Key, Url
from .cli_plan import plan
from .cli_profile import profile
from .cli_simulate import simulate
from .cli_typed import refused_text
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
app.add_typer(bench, name="bench")
app.command("calibrate")(calibrate)
app.command("plan")(plan)
app.command("profile")(profile)
app.command("simulate")(simulate)


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


def _set(overrides: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Adds the values that were given; `engine__device` stands for the dotted path `engine.device`."""
    overrides |= {name.replace("__", "."): value for name, value in values.items() if value is not None}
    return overrides


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


@app.command()
def version() -> None:
    """Print the version."""
    from .. import __version__

    print(__version__)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option(help="Alias, folder, .gguf file, Hugging Face id or dummy:<config>. Default: smollm2-135m."),
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers. Default: 1.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers. Default: 1.")] = None,
    mixed: Annotated[int | None, typer.Option(help="Workers that do both. Alone: --prefill 0 --decode 0.")] = None,
    config: Annotated[str | None, typer.Option(help="cluster.yaml; flags win over it.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join. Default: start a local one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    http_port: Annotated[int | None, typer.Option(help="0: any free one. Default: 8000.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0: any free one. Default: 8001.")] = None,
    registry_port: Annotated[int | None, typer.Option(help="Where workers report. Default: 8002.")] = None,
    router_processes: Annotated[
        int | None, typer.Option(help="Router processes behind the two public ports (Linux). Default: 1.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, or paced (computes nothing, takes a model's time).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32. Default: bfloat16.")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="w8a8: int8 weights and activations; w4a16 (cuda): 4-bit weights. Default: none."),
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="KV memory of a worker, e.g. 512MiB.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context, tokens. Default: the model's.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads of a worker. Default: 1.")] = None,
    transport: Annotated[
        str | None,
        typer.Option(help="How KV moves: auto, grpc, mapped (one host's memory), cuda_ipc, gloo, nccl. Default: auto."),
    ] = None,
    local_prefill_threshold: Annotated[
        int | None, typer.Option(help="Prompts with fewer uncached tokens skip the prefill pool. Default: 0, off.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    events: Annotated[str | None, typer.Option(help="Write each request's waterfall to this file, JSON lines.")] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds that running requests get at the end.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_VARIABLE, show_envvar=True, help="What clients must show; several: a,b,c."),
    ] = None,
    api_keys_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="One key a line; read again when it changes.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="Serve HTTPS and gRPC over TLS (PEM).")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="The certificate's private key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback though clients show no key.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the members' own output.")] = False,
) -> None:
    """Start a cluster and serve until Ctrl-C, which drains it; twice stops at once."""
    from .cli_serve import serve as run_serve
    from .config_file import build_config

    overrides = _set(
        {},
        model=model,
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        address=address,
        router__host=host,
        router__http_port=http_port,
        router__grpc_port=grpc_port,
        router__registry_port=registry_port,
        router__processes=router_processes,
        engine__device=device,
        engine__dtype=dtype,
        engine__quantization=quantization,
        engine__kv_cache_bytes=kv_cache,
        engine__max_model_len=max_model_len,
        engine__threads=threads,
        worker__transport=transport,
        router__local_prefill_threshold_tokens=local_prefill_threshold,
        router__served_model_name=served_model_name,
        router__events_path=events,
        drain_timeout_s=drain_timeout,
        router__api_key=api_key,
        router__api_keys_file=api_keys_file,
        router__tls_cert=tls_cert,
        router__tls_key=tls_key,
        insecure=insecure or None,
    )
    raise typer.Exit(run_serve(build_config(config, overrides), verbose=verbose))


@app.command()
def chat(
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
    raise typer.Exit(run_chat(options, prompt))


@app.command()
def status(
    url: Url = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="The router's own answer.")] = False,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="Again and again, until Ctrl-C.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Default: this user's own cluster's, else TANDEM_API_KEY.")
    ] = None,
    ca: Ca = None,
) -> None:
    """Show a running cluster's workers, ledger and handoffs. Exit code 1 where it is not ready."""
    from .cli_status import status as run_status
    from .cli_status import watch as run_watch
    from .tls import ClientTLS

    if watch is not None:
        raise typer.Exit(run_watch(url, watch, api_key=api_key, tls=ClientTLS.from_environment(ca)))
    raise typer.Exit(run_status(url, as_json=as_json, api_key=api_key, tls=ClientTLS.from_environment(ca)))


@app.command()
def doctor(
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Look at the files of this one.")] = "smollm2-135m",
    as_json: Annotated[bool, typer.Option("--json", help="Every finding as JSON.")] = False,
    api_key: Annotated[
        str | None, typer.Option(help="Default: this user's own cluster's, else TANDEM_API_KEY.")
    ] = None,
    ca: Ca = None,
) -> None:
    """Look at this machine and a running cluster, and say what to do. Exit code 1 where something is wrong."""
    from .cli_doctor import doctor as run_doctor
    from .tls import ClientTLS

    tls = ClientTLS.from_environment(ca)
    raise typer.Exit(run_doctor(url, model=model, as_json=as_json, api_key=api_key, tls=tls, say=_say))


@app.command()
def restart(
    workers: Annotated[list[str] | None, typer.Argument(metavar="WORKER", help="As `tandem status` names it.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every worker, one after another.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a worker gets to finish what it runs.")] = 30.0,
    url: Url = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(help="Default: this user's own cluster's, else TANDEM_API_KEY.")
    ] = None,
    ca: Ca = None,
) -> None:
    """Drain a worker and start it anew; requests go on. Returns when it is ready again."""
    from .cli_restart import restart as run_restart
    from .tls import ClientTLS

    tls, names = ClientTLS.from_environment(ca), workers or ()
    raise typer.Exit(run_restart(url, names, every=every, timeout_s=timeout, say=_say, api_key=api_key, tls=tls))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Model reference.")] = "smollm2-135m",
    device: Annotated[str, typer.Option(help="cpu or paced.")] = "cpu",
    num_prompts: Annotated[int, typer.Option(help="Requests of the load.", min=1)] = 12,
    request_rate: Annotated[float, typer.Option(help="Requests per second of the load.")] = 1.0,
) -> None:
    """Start a cluster, ask it a question, put some load on it, show what happened, stop it."""
    from .demo import DemoOptions, run_demo

    options = DemoOptions(model=model, device=device, num_prompts=num_prompts, request_rate=request_rate)
    raise typer.Exit(run_demo(options))


if __name__ == "__main__":
    main()
