from __future__ import annotations

import pytest
from tandem.cluster.hashing import KEY_BYTES, block_keys, extend_block_keys


def test_only_full_blocks_have_keys() -> None:
    assert block_keys([1, 2, 3], 4) == []
    keys = block_keys(tuple(range(11)), 4)
    assert len(keys) == 2
    assert all(len(key) == KEY_BYTES for key in keys)


def test_a_key_covers_everything_before_it() -> None:
    keys = block_keys([1, 2, 3, 4, 5, 6, 7, 8], 4)
    assert block_keys([1, 2, 3, 4, 9, 9, 9, 9], 4)[0] == keys[0]
    assert block_keys([9, 2, 3, 4, 5, 6, 7, 8], 4)[1] != keys[1]
    assert block_keys([5, 6, 7, 8], 4)[0] != keys[1]
    assert len({*keys, *block_keys([1, 2, 3, 4, 5, 6, 7, 8], 4, b"salt")}) == 4
    assert block_keys([1, 2, 3, 4], 2)[1] != keys[0]


def test_keys_grow_with_the_sequence() -> None:
    tokens = [7 * i for i in range(50)]
    keys: list[bytes] = []
    for length in range(0, 51, 3):
        extend_block_keys(keys, tokens[:length], 4, b"s")
        assert keys == block_keys(tokens[:length], 4, b"s")


def test_keys_are_the_same_on_every_machine_and_release() -> None:
    """Router and workers may run different releases: a changed key would silently cost every prefix hit."""
    assert block_keys([1, 2, 3, 2**32 - 1], 4, b"x")[0].hex() == "5256fe6211a9a4d4d7eeab455a50e7f0"


def test_token_ids_are_unsigned_32_bit() -> None:
    with pytest.raises(OverflowError):
        block_keys([-1, 0], 2)
