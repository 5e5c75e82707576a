"""Faults of KV messages on their way between the two workers, as rows of `faults.FAULTS`: of the first message of a
kind (of blocks: the second), once or always.
"""

from __future__ import annotations

from dataclasses import replace

import tampers
from faults import add
from kv_proxy import Tamper, What
from recipes import Recipe
from scenes import Scene
from scripted_router import Outcome
from tampers import Change


async def just_finish(scene: Scene, recipe: Recipe) -> Outcome:
    """What happens is in the tampering."""
    return await scene.finish()


def on_path(name: str, what: What, how: tampers.How, ending: str, *, times: int | None = 1, **facts: object) -> None:
    """Adds a row: `how` the message of this kind is changed, and how the request must end."""

    def tamper() -> Tamper:
        return Change(what, how, first=1 if what is What.BLOCK else 0, times=times)

    add(name, just_finish, ending, tamper=tamper, needs=what, **facts)


on_path("block_bit_flipped", What.BLOCK, tampers.flip_last_bit, "answer")
on_path("block_bit_always_flipped", What.BLOCK, tampers.flip_last_bit, "failed:corrupt", times=None, everywhere=False)
on_path("block_header_flipped", What.BLOCK, tampers.flip_header_bit, "answer", everywhere=False)
on_path("block_truncated", What.BLOCK, tampers.truncate, "answer")
on_path("block_always_truncated", What.BLOCK, tampers.truncate, "failed:corrupt", times=None, everywhere=False)
on_path("block_repeated", What.BLOCK, tampers.repeat, "answer")
on_path("block_lost", What.BLOCK, tampers.drop, "answer", everywhere=False)
add("blocks_swapped", just_finish, "answer", tamper=tampers.Swap, needs=What.BLOCK)
on_path("block_of_other_generation", What.BLOCK, tampers.other_generation, "answer")
on_path("wrong_generation_said", What.BLOCK, tampers.says_wrong_generation, "answer")
on_path(
    "wrong_generation_always_said",
    What.BLOCK,
    tampers.says_wrong_generation,
    "failed:wrong_generation",
    times=None,
    everywhere=False,
)
on_path("block_of_other_request", What.BLOCK, tampers.other_request, "answer", everywhere=False)
on_path("block_of_other_request_sealed", What.BLOCK, tampers.other_request_sealed, "answer")
on_path("block_without_checksum", What.BLOCK, tampers.without_checksum, "answer", everywhere=False)
on_path("stream_cut", What.BLOCK, tampers.cut, "answer")
on_path("stream_always_cut", What.BLOCK, tampers.cut, "failed:peer_lost", times=None, everywhere=False)
on_path("end_too_early", What.BLOCK, tampers.end_too_early, "answer")
on_path("end_lost", What.END, tampers.end_stream, "answer")
on_path("end_of_fewer_tokens", What.END, tampers.end_of_fewer_tokens, "answer", everywhere=False)
on_path("end_of_other_request", What.END, tampers.end_of_another, "answer", everywhere=False)
on_path("end_flipped", What.END, tampers.flip_last_bit, "answer", everywhere=False)

on_path("pull_cut", What.PULL, tampers.cut, "answer")
on_path("pull_flipped", What.PULL, tampers.flip_last_bit, "answer")
on_path(
    "pull_of_wrong_epoch", What.PULL, tampers.of_ticket(lambda t: replace(t, epoch=t.epoch ^ 2)), "failed:wrong_epoch"
)
on_path(
    "pull_of_other_worker",
    What.PULL,
    tampers.of_ticket(lambda t: replace(t, prefill_worker="other")),
    "failed:wrong_epoch",
)
on_path(
    "pull_of_wrong_fingerprint",
    What.PULL,
    tampers.of_ticket(lambda t: replace(t, fingerprint="other weights")),
    "failed:fingerprint_mismatch",
)
on_path(
    "pull_of_wrong_tokens",
    What.PULL,
    tampers.of_ticket(lambda t: replace(t, num_tokens=t.num_tokens + 1)),
    "failed:wrong_tokens",
)
on_path(
    "pull_of_older_attempt",
    What.PULL,
    tampers.of_ticket(lambda t: replace(t, decode_attempt=0)),
    "failed:corrupt",
    times=None,
)

on_path("hello_cut", What.HELLO, tampers.cut, "answer")
for _side, _what in (("holder", What.HELLO_REPLY), ("puller", What.HELLO)):
    on_path(
        f"version_mismatch_of_{_side}",
        _what,
        tampers.of_hello(lambda h: replace(h, protocol_version=h.protocol_version + 1)),
        "failed:version_mismatch",
    )
    on_path(
        f"fingerprint_mismatch_of_{_side}",
        _what,
        tampers.of_hello(lambda h: replace(h, fingerprint="other weights")),
        "failed:fingerprint_mismatch",
    )
    on_path(f"layout_mismatch_of_{_side}", _what, tampers.of_hello(tampers.other_head_dim), "failed:layout_mismatch")
on_path(
    "hello_of_another_life",
    What.HELLO_REPLY,
    tampers.of_hello(lambda h: replace(h, epoch=h.epoch ^ 2)),
    "failed:wrong_epoch",
    times=None,
)

on_path("confirm_repeated", What.CONFIRM, tampers.repeat, "answer")
on_path("confirm_cut_once", What.CONFIRM, tampers.cut, "answer")
on_path("confirm_never_comes", What.CONFIRM, tampers.cut, "answer", times=None, short=True)
on_path("confirm_of_wrong_epoch", What.CONFIRM, tampers.confirm_other_epoch, "answer", short=True, everywhere=False)


class Slow(Tamper):
    """Every message takes its time."""

    delay_s = 0.03


add("everything_delayed", just_finish, "answer", tamper=Slow)
