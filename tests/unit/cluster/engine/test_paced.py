"""The paced device: time to the model's word, tokens as `expected_tokens` says, and KV mistakes that show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from paced_driver import VOCAB, Driver, device, move, run
from tandem.cluster.clock import VirtualClock
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.devices.paced import KVCorruption, PacedDevice, PacedKVStore, expected_tokens
from tandem.cluster.engine.plan import StepPlan, StepRow
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.models.config import Architecture, ModelConfig
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.types import SampledToken, SamplingParams, StepTimeCoefficients

PROMPT = [7, 3, 999, 0, 0, 12, 5, 8, 1]


def test_generation_is_what_expected_tokens_says() -> None:
    tokens = Driver(device(), PROMPT, range(10, 20)).generate(12)
    assert tuple(tokens) == expected_tokens(PROMPT, 12, vocab_size=VOCAB)
    assert len(set(tokens)) > 6


@pytest.mark.parametrize("cuts", [[9], [4, 9], [1, 2, 3, 9], [8, 9]])
def test_chunks_do_not_change_the_tokens(cuts: list[int]) -> None:
    driver = Driver(device(), PROMPT, [3, 1, 2, 5, 4])
    start = 0
    for end in cuts:
        driver.step(start, end)
        start = end
    assert tuple(driver.generate(8)) == expected_tokens(PROMPT, 8, vocab_size=VOCAB)


def test_a_batch_of_sequences_is_independent() -> None:
    paced = device()
    drivers = [Driver(paced, PROMPT[: 3 + i], range(8 * i, 8 * i + 8), seq_id=str(i)) for i in range(5)]
    for step in range(6):
        ends = [len(d.prompt) + len(d.output) for d in drivers]
        starts = [end - 1 if step else 0 for end in ends]
        outputs = run(paced, [d.row(start, end) for d, start, end in zip(drivers, starts, ends, strict=True)])
        for driver, output in zip(drivers, outputs, strict=True):
            driver.output.append(output.tokens[0].token_id)
    for driver in drivers:
        assert tuple(driver.output) == expected_tokens(driver.prompt, 6, vocab_size=VOCAB)


def test_resuming_with_output_continues_the_stream() -> None:
    params = SamplingParams(seed=9)
    whole = expected_tokens(PROMPT, 8, params, vocab_size=VOCAB)
    rest = expected_tokens(PROMPT, 5, params, vocab_size=VOCAB, output_token_ids=whole[:3])
    assert whole[3:] == rest
    driver = Driver(device(), PROMPT, range(10), params)
    driver.output = list(whole[:3])
    driver.step(0, len(PROMPT) + 3)
    assert tuple(driver.generate(8)) == whole


# Handoff


def handed_off(target: PacedDevice, **options: object) -> tuple[PacedDevice, Driver]:
    """Prefills PROMPT elsewhere and moves its three blocks to 20, 21, 22 of `target`."""
    source = device(**options)
    first = Driver(source, PROMPT, [5, 9, 2, 7])
    first.step(0, 9)
    move(source, target, [(5, 20), (9, 21), (2, 22)])
    driver = Driver(target, PROMPT, [20, 21, 22, 23, 24, 25])
    driver.output = list(first.output)
    return source, driver


@pytest.mark.parametrize("pad", [0, 1, 100])
def test_a_correct_handoff_continues(pad: int) -> None:
    target = device(pad_bytes_per_token=pad)
    _, driver = handed_off(target, pad_bytes_per_token=pad)
    assert tuple(driver.generate(10)) == expected_tokens(PROMPT, 10, vocab_size=VOCAB)
    assert target.corruptions_total == 0


def corruption(driver: Driver) -> KVCorruption:
    with pytest.raises(KVCorruption) as caught:
        driver.generate(10)
    return caught.value


@pytest.mark.parametrize("block", [20, 21, 22])
def test_a_block_that_never_came_shows(block: int) -> None:
    target = device(raise_on_corruption=True)
    _, driver = handed_off(target)
    target.kv.write_block(block, bytes(target.kv.layout.block_bytes))
    error = corruption(driver)
    assert (error.seq_id, error.position) == ("a", (block - 20) * 4)
    assert "never written" in str(error)


def test_swapped_blocks_show() -> None:
    target = device(raise_on_corruption=True)
    source, driver = handed_off(target)
    move(source, target, [(5, 21), (9, 20)])
    assert corruption(driver).position == 0


def test_a_stale_tail_shows() -> None:
    """PEERS, trouble 6: the partial last block, off by one."""
    target = device(raise_on_corruption=True)
    _, driver = handed_off(target)
    target.kv.slots[22, :, 0] = 0
    assert corruption(driver).position == 8


def test_another_requests_kv_shows() -> None:
    """PEERS, trouble 2: a whole, consistent KV, of another prompt."""
    target = device(raise_on_corruption=True)
    source, driver = handed_off(target)
    Driver(source, [*PROMPT[:6], 1, 2, 3], [30, 31, 32], seq_id="b").step(0, 9)
    move(source, target, [(30, 20), (31, 21), (32, 22)])
    error = corruption(driver)
    assert error.position == 6
    assert "another token" in str(error)


@pytest.mark.parametrize("word", [0, 1])
def test_one_flipped_bit_shows(word: int) -> None:
    target = device(raise_on_corruption=True)
    _, driver = handed_off(target)
    target.kv.slots[21, word, 2] ^= np.uint64(1)
    assert corruption(driver).position == 6


def test_a_torn_copy_shows_in_the_padding() -> None:
    target = device(raise_on_corruption=True, pad_bytes_per_token=64)
    _, driver = handed_off(target, pad_bytes_per_token=64)
    target.kv.slots[21, 1, 3, 3:] = 0
    error = corruption(driver)
    assert error.position == 7
    assert "padding" in str(error)


def test_a_late_writer_into_a_running_sequence_shows() -> None:
    target = device(raise_on_corruption=True)
    source, driver = handed_off(target)
    driver.generate(4)
    end = len(PROMPT) + len(driver.output) - 1
    move(source, target, [(9, driver.blocks[(end - 1) // 4])])
    assert corruption(driver).position == end - 1


def test_checking_every_step_sees_a_late_writer_anywhere() -> None:
    target = device(raise_on_corruption=True, verify_every_step=True)
    _, driver = handed_off(target)
    driver.generate(4)
    target.kv.slots[20, 0, 1] = 5
    assert corruption(driver).position == 1


def test_a_corrupt_row_fails_alone_and_writes_nothing() -> None:
    paced = device()
    good, bad = Driver(paced, PROMPT, range(10)), Driver(paced, PROMPT, range(10, 20), seq_id="bad")
    good.step(0, 9)
    bad.output = list(good.output)
    first, second = run(paced, [good.row(9, 10), bad.row(9, 10)])
    assert [t.token_id for t in first.tokens] == [expected_tokens(PROMPT, 2, vocab_size=VOCAB)[1]]
    assert first.error == ""
    assert second.tokens == ()
    assert "'bad', position 0" in second.error
    assert paced.corruptions_total == 1
    assert not paced.kv.slots[10:20].any()


def test_a_prefix_hit_is_compared_with_the_context_once_it_samples() -> None:
    paced = device()
    Driver(paced, PROMPT, [0, 1, 2], seq_id="first").step(0, 9)
    hit = Driver(paced, [*PROMPT[:4], 50, 51, 52, 53, 54], [0, 5, 6])
    assert hit.step(4, 8).error == ""
    assert tuple(t.token_id for t in hit.step(8, 9).tokens) == expected_tokens(hit.prompt, 1, vocab_size=VOCAB)
    wrong = Driver(paced, [1, 2, 3, 4, 50, 51, 52, 53, 54], [0, 7, 8], seq_id="wrong")
    assert wrong.step(4, 8).error == ""
    assert "position 0" in wrong.step(8, 9).error


def test_preemption_and_recomputation_give_the_same_stream() -> None:
    paced = device()
    driver = Driver(paced, PROMPT, range(8))
    driver.generate(3)
    driver.blocks = list(range(30, 40))
    driver.step(0, len(PROMPT) + 3)
    assert tuple(driver.generate(8)) == expected_tokens(PROMPT, 8, vocab_size=VOCAB)


# Sampling options


def test_bans_are_honored_and_a_total_ban_fails_the_row() -> None:
    paced = device()
    first = expected_tokens(PROMPT, 1, vocab_size=VOCAB)[0]
    row = Driver(paced, PROMPT, range(4)).row(0, 9)
    assert row.sample is not None
    [output] = run(paced, [row._replace(sample=row.sample._replace(banned_token_ids=(first,)))])
    assert output.tokens[0].token_id == first + 1
    [output] = run(paced, [row._replace(sample=row.sample._replace(banned_token_ids=tuple(range(VOCAB))))])
    assert output.tokens == ()
    assert "banned_token_ids" in output.error


def test_logprobs_are_made_up_but_deterministic() -> None:
    params = SamplingParams(temperature=0.0, top_logprobs=3)
    outputs = [Driver(device(), PROMPT, range(4), params).step(0, 9).tokens for _ in range(2)]
    assert outputs[0] == outputs[1]
    token: SampledToken = outputs[0][0]
    assert token.logprob is not None
    assert token.logprob <= 0
    assert len(token.top) == 3
    assert token.top[0] == (token.token_id, token.logprob)
    assert [lp for _, lp in token.top] == sorted((lp for _, lp in token.top), reverse=True)


# Time


def test_a_step_takes_what_the_model_says() -> None:
    clock = VirtualClock(100.0)
    driver = Driver(device(clock=clock), PROMPT, range(8))
    driver.step(0, 9)
    assert clock.now_s() == 100.0 + 0.5 + 9 * 0.25
    driver.step(9, 10)
    assert clock.now_s() == 102.75 + 0.5 + 0.125 + 10 * 0.0625


def test_work_between_launch_and_collect_is_not_waited_for_twice() -> None:
    clock = VirtualClock()
    paced = device(clock=clock)
    row = Driver(paced, [1, 2], range(2)).row(0, 2)
    paced.launch(StepPlan(1, (row,)))
    clock.advance(0.4)
    assert paced.collect().duration_s == 1.0
    assert clock.now_s() == 1.0
    paced.launch(StepPlan(2, (row,)))
    clock.advance(3.0)
    assert paced.collect().duration_s == 3.0
    assert paced.late_steps_total == 1


def test_a_profile_paces_and_chunks_add_up_to_their_prompt(tmp_path: Path) -> None:
    decode = DecodeTerms(step_s=0.0, row_s=1.0, context_token_s=0.0)
    profile = StepProfile(
        prefill_step_s=0.0,
        prefill_token_s=0.0,
        prefill_square_s=0.25,
        decode=decode,
        large_decode=decode,
        large_batch_rows=8,
    )
    profile.save(tmp_path / "profile.json")
    engine = EngineConfig(device="paced", paced_profile=str(tmp_path / "profile.json"), kv_cache_bytes=2**20)
    clock = VirtualClock()
    driver = Driver(PacedDevice.for_model(engine, CONFIGS["tiny-llama"], clock=clock), [1] * 6, range(4))
    driver.step(0, 2)
    driver.step(2, 6)
    assert clock.now_s() == 0.25 * 6**2
    driver.step(6, 7)
    assert clock.now_s() == 0.25 * 6**2 + 1.0


def test_sleeping_a_little_long_is_not_late_but_much_is() -> None:
    for overrun_s, late in ((0.04, 0), (0.06, 1)):
        clock = VirtualClock()
        paced = device(clock=clock, sleep=lambda left_s, more_s=overrun_s, to=clock: to.advance(left_s + more_s))
        paced.launch(StepPlan(1, (Driver(paced, [1, 2], range(2)).row(0, 2),)))  # takes 1 s
        paced.collect()
        assert paced.late_steps_total == late


def test_outstanding_steps_run_one_after_another() -> None:
    clock = VirtualClock()
    paced = device(clock=clock)
    first, second = Driver(paced, [1, 2], [0]), Driver(paced, [3, 4], [1], seq_id="b")
    paced.launch(StepPlan(1, (first.row(0, 2),)))
    paced.launch(StepPlan(2, (second.row(0, 2),)))
    outputs = [paced.collect(), paced.collect()]
    assert [o.plan_id for o in outputs] == [1, 2]
    assert [o.duration_s for o in outputs] == [1.0, 1.0]
    assert clock.now_s() == 2.0


def test_sleep_gets_the_time_that_is_left() -> None:
    clock, slept = VirtualClock(), []
    paced = device(clock=clock, sleep=slept.append)
    paced.launch(StepPlan(1, (Driver(paced, [1, 2], range(2)).row(0, 2),)))
    clock.advance(0.25)
    paced.collect()
    assert slept == [0.75]


def test_real_time_is_not_shorter_than_the_model() -> None:
    paced = PacedDevice(VOCAB, num_blocks=4, coefficients=StepTimeCoefficients(step_s=0.003))
    paced.launch(StepPlan(1, (Driver(paced, [1, 2], [0]).row(0, 2),)))
    assert paced.collect().duration_s >= 0.003


# Refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (StepRow("a", 0, [], [0]), "computes 0 tokens"),
        (StepRow("a", -1, [1], [0]), "from position -1"),
        (StepRow("a", 0, [1] * 5, [0]), "1 blocks of 4 for 5 tokens"),
        (StepRow("a", 0, [1], [64]), "not in 0…63"),
        (StepRow("a", 0, [1], [-1]), "not in 0…63"),
        (StepRow("a", 0, [VOCAB], [0]), "not in 0…999"),
    ],
)
def test_a_malformed_plan_is_refused(row: StepRow, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        device().launch(StepPlan(0, (row,)))


def test_two_rows_writing_one_slot_are_refused() -> None:
    rows = (StepRow("a", 0, [1], [0]), StepRow("b", 0, [2], [0]))
    with pytest.raises(ValueError, match="same slot"):
        device().launch(StepPlan(0, rows))


def test_collect_and_launch_are_bounded() -> None:
    paced = device()
    with pytest.raises(RuntimeError, match="no step"):
        paced.collect()
    row = StepRow("a", 0, [1], [0])
    for plan_id in range(16):
        paced.launch(StepPlan(plan_id, (row,)))
    with pytest.raises(RuntimeError, match="outstanding"):
        paced.launch(StepPlan(16, (row,)))
    paced.close()
    paced.close()


def test_store_is_zero_copy_and_checks_its_arguments() -> None:
    store = PacedKVStore(block_size=4, num_blocks=2, pad_bytes_per_token=20)
    assert store.layout.block_bytes == 4 * (16 + 32)
    view = store.read_block(1)
    assert view.readonly
    assert len(view) == store.layout.block_bytes
    store.write_block(1, bytes(range(192)))
    assert bytes(view) == bytes(range(192))
    for call in (lambda: store.read_block(2), lambda: store.read_block(-1), lambda: store.write_block(0, b"short")):
        with pytest.raises(ValueError, match=r"block_id|payload"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"pad_bytes_per_token": -1},
        {"eos_probability": 0.5},
        {"eos_probability": 1.5, "eos_token_ids": (1,)},
        {"eos_token_ids": (VOCAB,)},
        {"coefficients": StepTimeCoefficients(step_s=-1.0)},
        {"block_size": 0},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if "coefficients" not in options else "step_s"):
        device(**options)


def test_for_model_has_the_models_capacity() -> None:
    model = ModelConfig(
        architecture=Architecture.LLAMA,
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        max_model_len=8192,
        eos_token_ids=(2,),
    )
    engine = EngineConfig(device="paced", kv_cache_bytes=30 * 2 * 3 * 64 * 2 * 16 * 100 + 5)
    paced = PacedDevice.for_model(engine, model, clock=VirtualClock())
    assert paced.kv.num_blocks == 100
    assert paced.vocab_size == 49152
    assert paced.fingerprint == PacedDevice.for_model(engine, model, clock=VirtualClock()).fingerprint
    with pytest.raises(ValueError, match="kv_cache_bytes"):
        PacedDevice.for_model(EngineConfig(device="paced", kv_cache_bytes=1000), model)
