"""Names of KV blocks by content: chained hashes of token ids. Router and engine call the same functions, so a router
can tell which worker holds a prompt's prefix without seeing any KV.

The key of a block covers every token before it too, because KV depends on them: key_i = H(key_{i-1}, tokens of block
i), and key_{-1} = H(salt, block size). H is BLAKE2b (RFC 7693) with 16 bytes of digest rather than a faster
non-cryptographic hash: a prompt crafted to collide with another one's key would be answered from that one's KV
(vLLM's CVE-2025-25183).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16
_PERSON = b"tandem-kv-1"
_TOKEN_BYTES = 4


def block_keys(token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """Keys of all full blocks of `token_ids`, first block first. Token ids are unsigned 32-bit."""
    keys: list[bytes] = []
    extend_block_keys(keys, token_ids, block_size, salt)
    return keys


def extend_block_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> None:
    """Appends to `keys` those of the full blocks of `token_ids` that it does not have yet; `keys` must come from the
    same tokens, block size and salt. Costs only the new blocks.
    """
    have, want = len(keys), len(token_ids) // block_size
    if have >= want:
        return
    words = array("I", token_ids[have * block_size : want * block_size])
    assert words.itemsize == _TOKEN_BYTES
    if sys.byteorder == "big":
        words.byteswap()
    data = memoryview(words.tobytes())
    stride = block_size * _TOKEN_BYTES
    parent = keys[-1] if keys else blake2b(block_size.to_bytes(8, "little") + salt, digest_size=KEY_BYTES).digest()
    for offset in range(0, len(data), stride):
        digest = blake2b(parent, digest_size=KEY_BYTES, person=_PERSON)
        digest.update(data[offset : offset + stride])
        parent = digest.digest()
        keys.append(parent)
