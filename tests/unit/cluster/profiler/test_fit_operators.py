"""Fits of operators: known constants found again, files read, the generated part written."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tandem.cluster.latency.operators import GemmTerms, Peaks, gemm_s
from tandem.cluster.profiler import fit_operators, operator_data
from tandem.cluster.profiler.fit_operators import MARK, errors, fit, fit_gemm_8bit, main, split, write_device
from tandem.cluster.profiler.operator_data import FILES, Samples


def line(terms: dict, samples: Samples) -> np.ndarray:
    return terms["fixed"] + terms["slope"] * samples.sizes["x"]


def drawn(fixed: float, slope: float, points: int = 200, noise: float = 0.0) -> Samples:
    draw = np.random.default_rng(1)
    x = draw.uniform(1, 100, points)
    seconds = (fixed + slope * x) * np.exp(draw.normal(0.0, noise, points))
    return Samples({"x": x}, seconds, np.arange(points, dtype=np.float64))


def written(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.write("\n".join((header, *rows)) + "\n")
    return path


def test_constants_are_found_again_over_orders_of_magnitude() -> None:
    terms = fit(line, {"fixed": 1.0, "slope": 1.0}, [drawn(3e-6, 2e-3)])
    assert terms == pytest.approx({"fixed": 3e-6, "slope": 2e-3}, rel=0.02)


def test_outliers_hardly_move_a_fit() -> None:
    samples = drawn(1.0, 0.1, noise=0.02)
    samples.seconds[::20] *= 10
    terms = fit(line, {"fixed": 1.0, "slope": 1.0}, [samples])
    assert terms["slope"] == pytest.approx(0.1, rel=0.03)


def test_sources_count_alike_whatever_their_size() -> None:
    terms = fit(line, {"fixed": 1.0, "slope": 1.0}, [drawn(1.0, 0.1, points=20), drawn(1.2, 0.12, points=2000)])
    assert terms["slope"] == pytest.approx(0.11, rel=0.03)


def test_a_products_overlap_is_found_again(tmp_path: Path) -> None:
    peaks = Peaks(flops_s=1e14, bytes_s=1e12)
    true = GemmTerms(launch_us=5, compute_share=0.7, inner_ns=0.4, bandwidth_share=0.8, overlap_power=1.5)
    rows = [
        f"fp8,{m},{n},{k},{1e3 * gemm_s(true, peaks, m, n, k, 1, 2)}"
        for m in (1, 16, 64, 128, 256, 512, 1024, 4096) for n in (512, 1024, 4096) for k in (512, 2048, 8192)
    ]  # fmt: skip
    written(tmp_path / "gemm.csv.gz", "gemm_dtype,m,n,k,latency", *rows)
    found = fit_gemm_8bit(tmp_path, replace(FILES["h100"], gemm="gemm.csv.gz"), peaks)
    for name in ("launch_us", "compute_share", "inner_ns", "bandwidth_share", "overlap_power"):
        assert found.terms[name] == pytest.approx(getattr(true, name), rel=0.02), name
    assert found.held_out["gemm_8bit"]["p90"] < 0.005


def test_errors_are_relative() -> None:
    found = errors(line, {"fixed": 0.0, "slope": 0.11}, drawn(0.0, 0.1))
    assert found == {"median": 0.1, "p90": 0.1, "points": 200}


def test_every_fifth_group_is_left_out_whole() -> None:
    groups = np.repeat(np.arange(10.0), 3)
    samples = Samples({"x": np.arange(30.0)}, np.ones(30), groups)
    fitted, out = split(samples)
    assert sorted(set(out.group)) == [4.0, 9.0]
    assert len(fitted) + len(out) == 30
    assert not set(fitted.group) & set(out.group)


def test_products_are_read_by_dtype_and_width(tmp_path: Path) -> None:
    path = written(
        tmp_path / "gemm.csv.gz",
        "gemm_dtype,m,n,k,latency",
        "bfloat16,1,512,1024,0.5",
        "bfloat16,8,512,1024,1.5",
        "bfloat16,8,1024,512,2.5",
        "bfloat16,8,256,512,2.5",
        "fp8,8,1024,512,9",
    )
    samples = operator_data.gemm_samples(path)
    assert samples.sizes["m"].tolist() == [1, 8, 8]
    assert samples.seconds.tolist() == [0.0005, 0.0015, 0.0025]
    assert samples.group.tolist() == [0, 0, 1]
    assert operator_data.gemm_samples(path, "fp8").seconds == pytest.approx([0.009])
    with pytest.raises(ValueError, match="none of the rows"):
        operator_data.gemm_samples(path, "int8")


def test_decode_attention_is_read_with_the_token_it_computes(tmp_path: Path) -> None:
    header = "batch_size,isl,num_heads,num_key_value_heads,head_dim,kv_cache_dtype,step,latency"
    path = written(
        tmp_path / "decode.csv.gz",
        header,
        "4,1,32,8,128,bfloat16,1023,0.02",
        "4,1,32,8,128,fp8,1023,0.01",
        "4,1,2,1,128,bfloat16,1023,0.01",
        "2048,1,32,8,128,bfloat16,1023,0.01",
    )
    samples = operator_data.decode_samples(path)
    assert {name: values.tolist() for name, values in samples.sizes.items()} == {
        "batch": [4], "heads": [32], "kv_heads": [8], "head_dim": [128], "context": [1024],
    }  # fmt: skip


def test_a_models_linears_are_split_over_its_ranks(tmp_path: Path) -> None:
    names = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "input_layernorm", "attn_rope", "add")
    header = ",".join(f"time_stats.{name}.median" for name in names)
    header += ",n_head,n_kv_head,n_embd,n_expanded_embd,use_gated_mlp,num_tokens,num_tensor_parallel_workers"
    path = written(tmp_path / "mlp.csv.gz", header, "1,2,3,4,5,6,,8,4,1024,4096,True,100,2")
    samples = operator_data.model_gemm_samples(path)
    assert samples.sizes["n"].tolist() == [(8 + 8) * 128 / 2, 1024, 2 * 4096 / 2, 1024]
    assert samples.sizes["k"].tolist() == [1024, 1024 / 2, 1024, 4096 / 2]
    assert samples.seconds == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    passes = operator_data.elementwise_samples(path, ("input_layernorm", "attn_rope", "add"))
    assert passes.sizes["bytes"].tolist() == [2 * 100 * 2 * 1024, 2 * 100 * 2 * 12 * 128 / 2]


def test_collectives_are_read_in_bytes(tmp_path: Path) -> None:
    header = "op_name,nccl_dtype,num_gpus,message_size,latency"
    path = written(
        tmp_path / "nccl.csv.gz", header, "all_reduce,half,2,1024,0.01", "all_reduce,int8,2,1024,9", "other,half,2,1,9"
    )
    samples = operator_data.all_reduce_samples(path)
    assert (samples.sizes["bytes"].tolist(), samples.sizes["ranks"].tolist()) == ([2048], [2])


def test_the_generated_part_replaces_what_was_below_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_operators, "FOLDER", tmp_path)
    path = tmp_path / "device.yaml"
    path.write_text(f"# by hand\nname: device\n{MARK}\nold: 1\n")
    write_device("device", {"terms": {"gemm": {"launch_us": 1.5}}})
    assert path.read_text() == f"# by hand\nname: device\n{MARK}\nterms:\n  gemm: {{launch_us: 1.5}}\n"
    path.write_text("name: device\n")
    with pytest.raises(ValueError, match="has no line"):
        write_device("device", {})


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "gemm_bf16.csv.gz cannot be read" in capsys.readouterr().err
