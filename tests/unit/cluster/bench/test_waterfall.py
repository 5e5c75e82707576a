from tandem.cluster.bench.waterfall import draw, spans

TIMES = {
    "queue_s": 0.01,
    "prefill_s": 0.04,
    "ttft_s": 0.055,
    "transfer_s": 0.03,
    "exposed_transfer_s": 0.005,
    "decode_s": 0.14,
    "e2e_s": 0.2,
    "transferred_bytes": 2**20,
}


def test_spans_lie_where_they_happened() -> None:
    parts = {part.name: part for part in spans(**TIMES, path="split")}
    assert (parts["queue"].start_s, parts["queue"].end_s) == (0.0, 0.01)
    assert parts["prefill"].end_s == 0.05
    assert parts["first token"].end_s == 0.055
    assert abs(parts["KV transfer"].end_s - 0.055) < 1e-12  # 5 ms after prefill's end
    assert abs(parts["KV transfer"].start_s - 0.025) < 1e-12  # beside prefill
    assert abs(parts["decode"].start_s - 0.06) < 1e-12


def test_no_transfer_where_nothing_was_split() -> None:
    assert "KV transfer" not in {part.name for part in spans(**TIMES, path="local")}


def test_drawing() -> None:
    lines = draw(spans(**TIMES, path="split"), width=20).splitlines()
    assert lines[0] == "queue       |#                   |     10.0 ms"
    assert lines[1] == "prefill     | ####               |     40.0 ms"
    assert lines[4] == "decode      |      ##############|    140.0 ms"
    assert lines[3].endswith("(1.00 MiB, ended 5.0 ms after prefill)")
    assert lines[-1].endswith("200 ms")
    assert len({line.rindex("|") for line in lines[:-1]}) == 1
