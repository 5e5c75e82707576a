"""`tandem bench`: each subcommand lives in its own `cli_bench_<name>.py` and is registered here by one line."""

from __future__ import annotations

import typer

from .cli_bench_claims import batching, kv_waste
from .cli_bench_disaggregation import disaggregation
from .cli_bench_engine import engine
from .cli_bench_handoff import handoff
from .cli_bench_replay import replay
from .cli_bench_router import router
from .cli_bench_serve import serve
from .cli_bench_simulate import simulate
from .cli_bench_transfer import transfer
from .cli_bench_validate import validate

bench = typer.Typer(help="Measure a running server, an engine, a handoff, a router.", rich_markup_mode=None)
bench.command("serve")(serve)
bench.command("router")(router)
bench.command("handoff")(handoff)
bench.command("transfer")(transfer)
bench.command("engine")(engine)
bench.command("disaggregation")(disaggregation)
bench.command("replay")(replay)
bench.command("simulate")(simulate)
bench.command("validate")(validate)
bench.command("batching")(batching)
bench.command("kv-waste")(kv_waste)
