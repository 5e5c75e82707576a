"""The options of `tandem serve`, and where in a cluster's configuration each of them stands."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_options import API_KEY_VARIABLE

Model = Annotated[
    str | None,
    typer.Option(help="Alias, folder, .gguf file, Hugging Face id or dummy:<config>. Default: smollm2-135m."),
]
Prefill = Annotated[int | None, typer.Option(help="Prefill workers. Default: 1.")]
Decode = Annotated[int | None, typer.Option(help="Decode workers. Default: 1.")]
Mixed = Annotated[int | None, typer.Option(help="Workers that do both. Alone: --prefill 0 --decode 0.")]
Config = Annotated[str | None, typer.Option(help="cluster.yaml; flags win over it.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join. Default: start a local one.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")]
HttpPort = Annotated[int | None, typer.Option(help="0: any free one. Default: 8000.")]
GrpcPort = Annotated[int | None, typer.Option(help="0: any free one. Default: 8001.")]
RegistryPort = Annotated[int | None, typer.Option(help="Where workers report. Default: 8002.")]
RouterProcesses = Annotated[
    int | None, typer.Option(help="Router processes behind the two public ports (Linux). Default: 1.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or paced (computes nothing, takes a model's time).")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16 or float32. Default: bfloat16.")]
Quantization = Annotated[
    str | None,
    typer.Option(help="w8a8: int8 weights and activations; w4a16 (cuda): 4-bit weights. Default: none."),
]
KvCacheDtype = Annotated[
    str | None, typer.Option(help="KV memory on cuda: auto (as --dtype), int8 or fp8. Default: auto.")
]
KvScales = Annotated[
    str | None, typer.Option(metavar="FILE", help="Scales of int8 or fp8 KV, as tandem calibrate makes them.")
]
KvCache = Annotated[str | None, typer.Option(help="KV memory of a worker, e.g. 512MiB.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest context, tokens. Default: the model's.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads of a worker. Default: 1.")]
Transport = Annotated[
    str | None,
    typer.Option(help="How KV moves: auto, grpc, mapped (one host's memory), cuda_ipc, gloo, nccl. Default: auto."),
]
LocalPrefillThreshold = Annotated[
    int | None, typer.Option(help="Prompts with fewer uncached tokens skip the prefill pool. Default: 0, off.")
]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call the model.")]
Events = Annotated[str | None, typer.Option(help="Write each request's waterfall to this file, JSON lines.")]
DrainTimeout = Annotated[float | None, typer.Option(help="Seconds that running requests get at the end.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar=API_KEY_VARIABLE, show_envvar=True, help="What clients must show; several: a,b,c."),
]
ApiKeysFile = Annotated[str | None, typer.Option(metavar="FILE", help="One key a line; read again when it changes.")]
TlsCert = Annotated[str | None, typer.Option(metavar="FILE", help="Serve HTTPS and gRPC over TLS (PEM).")]
TlsKey = Annotated[str | None, typer.Option(metavar="FILE", help="The certificate's private key.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback though clients show no key.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the members' own output.")]

PATHS = {
    "model": "model",
    "prefill": "prefill",
    "decode": "decode",
    "mixed": "mixed",
    "address": "address",
    "host": "router.host",
    "http_port": "router.http_port",
    "grpc_port": "router.grpc_port",
    "registry_port": "router.registry_port",
    "router_processes": "router.processes",
    "device": "engine.device",
    "dtype": "engine.dtype",
    "quantization": "engine.quantization",
    "kv_cache_dtype": "engine.kv_cache_dtype",
    "kv_scales": "engine.kv_scales",
    "kv_cache": "engine.kv_cache_bytes",
    "max_model_len": "engine.max_model_len",
    "threads": "engine.threads",
    "transport": "worker.transport",
    "local_prefill_threshold": "router.local_prefill_threshold_tokens",
    "served_model_name": "router.served_model_name",
    "events": "router.events_path",
    "drain_timeout": "drain_timeout_s",
    "api_key": "router.api_key",
    "api_keys_file": "router.api_keys_file",
    "tls_cert": "router.tls_cert",
    "tls_key": "router.tls_key",
    "insecure": "insecure",
}
"""Of those that were given; all others are the file's, or the configuration's own."""
