"""Which steps are measured, and how they lie in KV memory."""

from __future__ import annotations

import pytest
from tandem.cluster.engine.step_shape import step_shape
from tandem.cluster.profiler.points import Grid, Places, Point, check_enough, fitting, point_of

SMALL = Grid(
    lengths=(8, 16),
    starts=(16,),
    chunk_lengths=(4,),
    batches=(1, 3),
    contexts=(5, 20),
    mixed_batches=(2,),
    mixed_contexts=(6,),
    mixed_lengths=(4,),
)


def test_a_grid_has_all_kinds_of_steps() -> None:
    assert [point.name for point in SMALL.points()] == [
        "prefill 8",
        "prefill 16",
        "prefill 4 behind 16",
        "decode 1 x 5",
        "decode 3 x 5",
        "decode 1 x 20",
        "decode 3 x 20",
        "decode 2 x 6 + prefill 4",
    ]


@pytest.mark.parametrize("point", SMALL.points(), ids=lambda point: point.name)
def test_sizes_are_those_of_the_step(point: Point) -> None:
    places = Places(SMALL.points(), 4, vocab_size=50)
    shape = step_shape(places.plan(point, 1))
    assert point.sizes == (shape.prefill_tokens, shape.prefill_squares, shape.decode_rows, shape.context_tokens)


def test_sequences_have_blocks_of_their_own_and_the_same_tokens_in_every_step() -> None:
    places = Places(SMALL.points(), 4, vocab_size=50)
    owned = [blocks for blocks, _ in places.sequences]
    assert sorted(block for blocks in owned for block in blocks) == list(range(places.blocks))
    assert places.blocks == 3 * 6 + 5  # three rows of 21 positions, a prompt of 20
    short, long = (places.plan(Point(2, context), 1) for context in (5, 20))
    for row, other, (_, tokens) in zip(short.rows, long.rows, places.sequences, strict=False):
        assert (list(row.token_ids), list(other.token_ids)) == (tokens[5:6], tokens[20:21])
        assert other.block_ids[: len(row.block_ids)] == row.block_ids


def test_what_does_not_fit_is_left_out_by_name_the_largest_first() -> None:
    kept, left_out = fitting(SMALL.points(), max_model_len=20, kv_tokens=10_000, block_size=4)
    assert left_out == ("decode 1 x 20", "decode 3 x 20")
    kept, left_out = fitting(SMALL.points(), max_model_len=64, kv_tokens=64, block_size=4)
    assert left_out == ("decode 3 x 20",)
    assert Places(kept, 4).blocks * 4 <= 64
    assert fitting(SMALL.points(), max_model_len=64, kv_tokens=0, block_size=4)[0] == ()
    with pytest.raises(ValueError, match="points: none is left"):
        Places((), 4)


def test_too_few_points_are_refused_before_they_are_measured() -> None:
    check_enough(Grid().points())
    with pytest.raises(ValueError, match=r"points: 4 with a prompt are too few; allowed: at least 6$"):
        check_enough(SMALL.points())
    prompts = [point for point in Grid().points() if not point.batch]
    with pytest.raises(ValueError, match=r"points: 0 with decode rows are too few; .* 6; no time was left$"):
        check_enough(prompts, "no time was left")


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"lengths": (0,)}, r"lengths: \[0\] is not allowed; allowed: different numbers from 1"),
        ({"batches": (2, 2)}, "batches"),
        ({"chunk_lengths": (1,)}, "chunk_lengths: .* from 2"),
        ({"contexts": (2**21,)}, "contexts"),
    ],
)
def test_a_wrong_list_is_named(grid: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Grid(**grid)


@pytest.mark.parametrize("sizes", [(), (1, 0, 4), (0, 4, 4), (0, 0, 1, 8), (-1, 3, 1)])
def test_a_point_that_is_no_step_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        Point(*sizes)


def test_a_point_is_found_again_by_its_sizes() -> None:
    for point in Grid().points():
        assert point_of(point.sizes) == point
    with pytest.raises(ValueError, match="are not those of a point"):
        point_of((0, 0, 3, 100))
    with pytest.raises(ValueError, match="are not those of a point"):
        point_of((64, 64 * 64 + 1, 0, 0))
