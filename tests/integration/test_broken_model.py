"""`tandem serve` on a broken model: one line that names the file and the reason, exit code 1, nothing left running."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

TIMEOUT_S = 120
MARK = "TANDEM_TEST_RUN"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {letter: index for index, letter in enumerate("abcdefgh")}, "merges": []},
}


def serve(model: Path, tmp_path: Path) -> tuple[str, str]:
    """What it said on both streams; fails if anything that it started is still there after a moment."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "tandem.cluster.cli", "serve", "--model", str(model)]
    command += ["--http-port", "0", "--grpc-port", "0", "--registry-port", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path, env={**os.environ, MARK: mark}
    )
    assert done.returncode == 1, done.stderr
    end_s = time.monotonic() + 20
    while left := marked(mark):
        assert time.monotonic() < end_s, left
        time.sleep(0.1)
    return done.stdout, done.stderr


def marked(mark: str) -> list[str]:
    """Command lines of processes that were started with this mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def write_gguf(path: Path, *, tensor: str = "token_embd.weight", layers: int = 1) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"block_count": layers, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8}
    for key, number in {**numbers, "attention.head_count": 2}.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    writer.add_tensor(tensor, np.zeros((2, 8), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path.read_bytes()


def hf_folder(path: Path, config: bytes, weights: bytes = b"") -> Path:
    path.mkdir()
    (path / "config.json").write_bytes(config)
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "model.safetensors").write_bytes(weights)
    return path


def empty(path: Path) -> Path:
    (path / "m.gguf").write_bytes(b"")
    return path / "m.gguf"


def noise(path: Path) -> Path:
    (path / "m.gguf").write_bytes(b"\x7fELF" + bytes(1000))
    return path / "m.gguf"


def cut_header(path: Path) -> Path:
    file = path / "m.gguf"
    file.write_bytes(write_gguf(file)[:200])
    return file


def cut_tensor(path: Path) -> Path:
    file = path / "m.gguf"
    file.write_bytes(write_gguf(file)[:-40])
    return file


def lying_count(path: Path) -> Path:
    file = path / "m.gguf"
    data = bytearray(write_gguf(file))
    data[8:24] = struct.pack("<QQ", 2**60, 2**60)
    file.write_bytes(data)
    return file


def lying_layers(path: Path) -> Path:
    write_gguf(path / "m.gguf", layers=2**31)
    return path / "m.gguf"


def no_vocabulary_tensor(path: Path) -> Path:
    write_gguf(path / "m.gguf", tensor="blk.0.attn_q.weight")
    return path / "m.gguf"


def config_no_json(path: Path) -> Path:
    return hf_folder(path / "m", b"{'model_type': 'llama'}")


def config_deep(path: Path) -> Path:
    return hf_folder(path / "m", b'{"a":' * 50_000)


def config_huge(path: Path) -> Path:
    return hf_folder(path / "m", json.dumps({**CONFIG, "hidden_size": 2**70}).encode())


def config_of_strangers(path: Path) -> Path:
    return hf_folder(path / "m", json.dumps({**CONFIG, "model_type": "unheard-of"}).encode())


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (empty, "m.gguf is not a usable GGUF file: cannot mmap an empty file"),
        (noise, r"m.gguf is not a usable GGUF file: it begins with b'\x7fELF', not b'GGUF'"),
        (cut_header, "m.gguf is not a usable GGUF file: it is truncated"),
        (cut_tensor, "it is truncated: tensor 'token_embd.weight' ends at byte"),
        (lying_count, "m.gguf is not a usable GGUF file"),
        (lying_layers, "llama.block_count is 2147483648, allowed: 1 to 4096"),
        (no_vocabulary_tensor, "tensor 'token_embd.weight' is missing"),
        (config_no_json, "config.json is not valid JSON"),
        (config_deep, "config.json is not valid JSON"),
        (config_huge, "config.json: hidden_size is 1180591620717411303424, allowed: 1 to 268435456"),
        (config_of_strangers, "model_type is 'unheard-of', allowed: llama, mistral, qwen2, qwen3, opt"),
    ],
)
def test_a_broken_header_ends_before_anything_starts(
    broken: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    out, err = serve(broken(tmp_path), tmp_path)
    assert err.startswith("tandem: ")
    assert (words in err, err.count("\n"), "Traceback" in out + err) == (True, 1, False), err


def cut_safetensors(path: Path) -> Path:
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [8, 16], "data_offsets": [0, 512]}}).encode()
    return hf_folder(path / "m", json.dumps(CONFIG).encode(), struct.pack("<Q", len(header)) + header + bytes(100))


def missing_tensor(path: Path) -> Path:
    write_gguf(path / "m.gguf")
    return path / "m.gguf"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (cut_safetensors, "model.safetensors cannot be read as safetensors"),
        (missing_tensor, "tensor 'output_norm.weight' (final_norm.weight) is missing; expected shape (8,)"),
    ],
)
def test_broken_weights_end_what_was_started(broken: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    """Found by the workers, when the cluster is already being placed."""
    out, err = serve(broken(tmp_path), tmp_path)
    last = err.strip().splitlines()[-1]
    assert last.startswith("tandem: ")
    assert (words in last, "Traceback" in out + err) == (True, False), err
