"""A whole step of a decoder in one call without the interpreter: rows of tokens in, logits of the sampled ones out.

Legend: T tokens of the step, R sampled ones, C hidden size, E embedding width, F MLP width, H query heads, K kv heads,
D head dim, V vocabulary, S slots of a block, L layers. What is computed is `cluster.engine.model`'s; see there.

Every rank of a team runs `decoder_step` over the same descriptors and takes its share of each operation: panels of
outputs of a product, rows of a norm, items of attention as they come. A barrier ends each. Which rank computes what
changes no bit of it.

`model` and `step` are addresses of int64 words (`MODEL`, `LAYER`, `STEP`): counts, addresses, strides in bytes. Rows of
buffers are padded with zeros to whole panels.
"""

from __future__ import annotations

from .activation import activate
from .atomics import atomic_add
from .attention import ITEM
from .embedding import embed
from .entry import entry_call
from .kv_write import kv_write
from .norm import head_norm, layer_norm, rms_norm
from .rotary import rotary_table, rotate
from .simd import VECTOR_BYTES, load, load_float, load_int64, store
from .target import kernel
from .team import barrier

MODEL = 22
(
    M_LAYERS,  # L
    M_LAYER_TABLE,  # address of L x LAYER words
    M_HIDDEN,  # C
    M_HEADS,  # H
    M_KV_HEADS,  # K
    M_HEAD_DIM,  # D
    M_MLP_PANELS,  # panels of F
    M_ACTIVATION,  # one of `activation.ACTIVATIONS`
    M_GATED,
    M_NORM_BEFORE,
    M_EPS,  # address of a float32
    M_FREQUENCIES,  # address of D/2 float32; 0: no rotary embedding
    M_EMBED,  # address of `embedding.TABLE` words
    M_POSITIONS,  # the same, of learned positions; 0: none
    M_POSITION_OFFSET,  # row of position 0
    M_PROJECT_IN,  # linears: addresses of `linear.describe`'s words; 0: none
    M_PROJECT_OUT,
    M_FINAL_WEIGHT,  # address of float32 [C, padded]; 0: no final norm
    M_FINAL_BIAS,  # 0: RMS norm
    M_HEAD,
    M_LINEAR,  # addresses of entries (`entry`): `linear.linear`, `attention.attend`
    M_ATTEND,
) = range(MODEL)

LAYER = 10
L_NORM_WEIGHT, L_NORM_BIAS, L_QKV, L_Q_NORM, L_K_NORM, L_OUT, L_MLP_NORM_WEIGHT, L_MLP_NORM_BIAS, L_UP, L_DOWN = range(
    LAYER
)
"""Norms: addresses of padded float32 vectors, biases 0 for RMS; q and k norms 0: none. Linears: described."""

STEP = 37
(
    S_TOKENS,  # T
    S_SAMPLED,  # R
    S_NARROW,  # the last layer goes on for `S_SAMPLED_ROWS` alone; 0: all T are sampled, in order
    S_IDS,  # int64 [T]
    S_POSITIONS,  # int64 [T]
    S_SAMPLED_ROWS,  # int64 [R]
    S_KV,  # paged KV memory [N, L, 2, K, S, D]
    S_KV_HALF,  # bfloat16
    S_KV_LAYER_BYTES,
    S_KV_HEAD_BYTES,
    S_KV_PLACES,  # int64 [T]: bytes from S_KV to a token's slot in layer 0, keys of kv head 0
    S_GEOMETRY,  # address of `attention.GEOMETRY` words
    S_ITEMS,  # `attention.ITEM` words each
    S_ITEM_COUNT,
    S_SAMPLED_ITEMS,
    S_SAMPLED_ITEM_COUNT,
    S_COUNTERS,  # int64 [L], zeroed: items taken
    S_ROTARY,  # float32 [T, D]
    S_X,  # float32 rows, each with its stride
    S_X_STRIDE,
    S_NARROWED,  # x of the sampled rows, as S_X
    S_NORMED,  # as S_X
    S_QKV,
    S_QKV_STRIDE,
    S_ATTENDED,
    S_ATTENDED_STRIDE,
    S_UP,
    S_UP_STRIDE,
    S_MLP,
    S_MLP_STRIDE,
    S_EMBEDDED,  # [T, E]: before project_in, and after project_out
    S_EMBEDDED_STRIDE,
    S_LOGITS,
    S_LOGITS_STRIDE,
    S_SCRATCH,
    S_SCRATCH_BYTES,  # of each rank
    S_BARRIER,
) = range(STEP)


_call_linear, _call_attend = entry_call(10), entry_call(5)


@kernel
def _multiply(
    model: int,
    step: int,
    weights: int,
    x: int,
    x_stride: int,
    rows: int,
    y: int,
    y_stride: int,
    add: int,
    rank: int,
    ranks: int,
) -> None:
    """y = or += x W^T + b, and a barrier."""
    scratch = load_int64(step + 8 * S_SCRATCH) + rank * load_int64(step + 8 * S_SCRATCH_BYTES)
    _call_linear(
        load_int64(model + 8 * M_LINEAR), weights, x, x_stride // 4, rows, y, y_stride // 4, add, rank, ranks, scratch
    )
    barrier(load_int64(step + 8 * S_BARRIER), ranks)


@kernel
def _normalize(model: int, step: int, x: int, y: int, rows: int, weight: int, bias: int, rank: int, ranks: int) -> None:
    """y = norm(x), rows of C; and a barrier."""
    channels, eps = load_int64(model + 8 * M_HIDDEN), load_float(load_int64(model + 8 * M_EPS))
    stride = load_int64(step + 8 * S_X_STRIDE)
    first, last = rows * rank // ranks, rows * (rank + 1) // ranks
    if bias:
        layer_norm(x, stride, y, stride, first, last, weight, bias, channels, eps)
    else:
        rms_norm(x, stride, y, stride, first, last, weight, channels, eps)
    barrier(load_int64(step + 8 * S_BARRIER), ranks)


@kernel
def _begin(model: int, step: int, rank: int, ranks: int) -> None:
    """Embeddings, positions, and the rotary table of the step's tokens."""
    tokens = load_int64(step + 8 * S_TOKENS)
    ids, positions = load_int64(step + 8 * S_IDS), load_int64(step + 8 * S_POSITIONS)
    first, last = tokens * rank // ranks, tokens * (rank + 1) // ranks
    x, x_stride = load_int64(step + 8 * S_X), load_int64(step + 8 * S_X_STRIDE)
    project, table = load_int64(model + 8 * M_PROJECT_IN), load_int64(model + 8 * M_EMBED)
    if project:
        embedded, stride = load_int64(step + 8 * S_EMBEDDED), load_int64(step + 8 * S_EMBEDDED_STRIDE)
        embed(table, ids, 0, first, last, embedded, stride, 0)
        barrier(load_int64(step + 8 * S_BARRIER), ranks)
        _multiply(model, step, project, embedded, stride, tokens, x, x_stride, 0, rank, ranks)
    else:
        embed(table, ids, 0, first, last, x, x_stride, 0)
    learned, frequencies = load_int64(model + 8 * M_POSITIONS), load_int64(model + 8 * M_FREQUENCIES)
    if learned:
        embed(learned, positions, load_int64(model + 8 * M_POSITION_OFFSET), first, last, x, x_stride, 1)
    if frequencies:
        head_dim = load_int64(model + 8 * M_HEAD_DIM)
        rotary_table(positions, first, last, frequencies, head_dim, load_int64(step + 8 * S_ROTARY))
    barrier(load_int64(step + 8 * S_BARRIER), ranks)


@kernel
def _place_heads(model: int, step: int, layer: int, index: int, rank: int, ranks: int) -> None:
    """Normalizes and turns queries and keys in place; writes keys and values to memory; and a barrier."""
    tokens = load_int64(step + 8 * S_TOKENS)
    heads, kv_heads = load_int64(model + 8 * M_HEADS), load_int64(model + 8 * M_KV_HEADS)
    head_dim, eps = load_int64(model + 8 * M_HEAD_DIM), load_float(load_int64(model + 8 * M_EPS))
    q_norm, k_norm = load_int64(layer + 8 * L_Q_NORM), load_int64(layer + 8 * L_K_NORM)
    rotary = load_int64(step + 8 * S_ROTARY) if load_int64(model + 8 * M_FREQUENCIES) else 0
    half, head_bytes = load_int64(step + 8 * S_KV_HALF), load_int64(step + 8 * S_KV_HEAD_BYTES)
    memory = load_int64(step + 8 * S_KV) + index * load_int64(step + 8 * S_KV_LAYER_BYTES)
    places = load_int64(step + 8 * S_KV_PLACES)
    for token in range(tokens * rank // ranks, tokens * (rank + 1) // ranks):
        q = load_int64(step + 8 * S_QKV) + token * load_int64(step + 8 * S_QKV_STRIDE)
        k = q + 4 * heads * head_dim
        if q_norm:
            head_norm(q, heads, head_dim, q_norm, eps)
            head_norm(k, kv_heads, head_dim, k_norm, eps)
        if rotary:
            rotate(q, heads + kv_heads, head_dim, rotary + 4 * token * head_dim)
        kv_write(k, memory + load_int64(places + 8 * token), kv_heads, head_dim, head_bytes, half)
    barrier(load_int64(step + 8 * S_BARRIER), ranks)


@kernel
def _attend(model: int, step: int, index: int, items: int, count: int, rank: int, ranks: int) -> None:
    """Items of attention, by whoever is free; and a barrier."""
    kv_heads, geometry = load_int64(model + 8 * M_KV_HEADS), load_int64(step + 8 * S_GEOMETRY)
    memory = load_int64(step + 8 * S_KV) + index * load_int64(step + 8 * S_KV_LAYER_BYTES)
    scratch = load_int64(step + 8 * S_SCRATCH) + rank * load_int64(step + 8 * S_SCRATCH_BYTES)
    taken = load_int64(step + 8 * S_COUNTERS) + 8 * index
    work = atomic_add(taken, 1)
    while work < count * kv_heads:
        _call_attend(
            load_int64(model + 8 * M_ATTEND),
            geometry,
            memory,
            items + 8 * ITEM * (work // kv_heads),
            work % kv_heads,
            scratch,
        )
        work = atomic_add(taken, 1)
    barrier(load_int64(step + 8 * S_BARRIER), ranks)


@kernel
def _narrow(step: int, rank: int, ranks: int) -> int:
    """Copies the sampled rows of x together; returns where; and a barrier."""
    rows, stride = load_int64(step + 8 * S_SAMPLED), load_int64(step + 8 * S_X_STRIDE)
    x, to, sampled = (
        load_int64(step + 8 * S_X),
        load_int64(step + 8 * S_NARROWED),
        load_int64(step + 8 * S_SAMPLED_ROWS),
    )
    for row in range(rows * rank // ranks, rows * (rank + 1) // ranks):
        source = x + load_int64(sampled + 8 * row) * stride
        for i in range(0, stride, VECTOR_BYTES):
            store(to + row * stride + i, load(source + i))
    barrier(load_int64(step + 8 * S_BARRIER), ranks)
    return to


@kernel
def _mlp(model: int, step: int, layer: int, x: int, rows: int, rank: int, ranks: int) -> None:
    """x += down(activation(up(norm(x)))), the norm before or, around the whole, after."""
    before = load_int64(model + 8 * M_NORM_BEFORE)
    stride, normed = load_int64(step + 8 * S_X_STRIDE), load_int64(step + 8 * S_NORMED)
    weight, bias = load_int64(layer + 8 * L_MLP_NORM_WEIGHT), load_int64(layer + 8 * L_MLP_NORM_BIAS)
    up, up_stride = load_int64(step + 8 * S_UP), load_int64(step + 8 * S_UP_STRIDE)
    hidden, hidden_stride = load_int64(step + 8 * S_MLP), load_int64(step + 8 * S_MLP_STRIDE)
    if before:
        _normalize(model, step, x, normed, rows, weight, bias, rank, ranks)
    source = normed if before else x
    _multiply(model, step, load_int64(layer + 8 * L_UP), source, stride, rows, up, up_stride, 0, rank, ranks)
    panels = load_int64(model + 8 * M_MLP_PANELS)
    first, last = panels * rank // ranks, panels * (rank + 1) // ranks
    kind, gated = load_int64(model + 8 * M_ACTIVATION), load_int64(model + 8 * M_GATED)
    activate(kind, gated, up, up_stride, hidden, hidden_stride, rows, first, last)
    barrier(load_int64(step + 8 * S_BARRIER), ranks)
    _multiply(model, step, load_int64(layer + 8 * L_DOWN), hidden, hidden_stride, rows, x, stride, 1, rank, ranks)
    if not before:
        _normalize(model, step, x, x, rows, weight, bias, rank, ranks)


@kernel
def _layer(model: int, step: int, index: int, rank: int, ranks: int) -> None:
    """One layer; the last one goes on, after all KV is written, for the sampled tokens alone."""
    layer = load_int64(model + 8 * M_LAYER_TABLE) + 8 * LAYER * index
    before, rows = load_int64(model + 8 * M_NORM_BEFORE), load_int64(step + 8 * S_TOKENS)
    x, stride, normed = load_int64(step + 8 * S_X), load_int64(step + 8 * S_X_STRIDE), load_int64(step + 8 * S_NORMED)
    qkv, qkv_stride = load_int64(step + 8 * S_QKV), load_int64(step + 8 * S_QKV_STRIDE)
    attended, attended_stride = load_int64(step + 8 * S_ATTENDED), load_int64(step + 8 * S_ATTENDED_STRIDE)
    weight, bias = load_int64(layer + 8 * L_NORM_WEIGHT), load_int64(layer + 8 * L_NORM_BIAS)
    if before:
        _normalize(model, step, x, normed, rows, weight, bias, rank, ranks)
    source = normed if before else x
    _multiply(model, step, load_int64(layer + 8 * L_QKV), source, stride, rows, qkv, qkv_stride, 0, rank, ranks)
    _place_heads(model, step, layer, index, rank, ranks)
    items, count = load_int64(step + 8 * S_ITEMS), load_int64(step + 8 * S_ITEM_COUNT)
    if load_int64(step + 8 * S_NARROW) and index == load_int64(model + 8 * M_LAYERS) - 1:
        items, count = load_int64(step + 8 * S_SAMPLED_ITEMS), load_int64(step + 8 * S_SAMPLED_ITEM_COUNT)
        rows = load_int64(step + 8 * S_SAMPLED)
        if rows == 0:
            return
        x = _narrow(step, rank, ranks)
    _attend(model, step, index, items, count, rank, ranks)
    _multiply(model, step, load_int64(layer + 8 * L_OUT), attended, attended_stride, rows, x, stride, 1, rank, ranks)
    if not before:
        _normalize(model, step, x, x, rows, weight, bias, rank, ranks)
    _mlp(model, step, layer, x, rows, rank, ranks)


@kernel
def decoder_step(model: int, step: int, rank: int, ranks: int) -> None:
    """Computes a step: writes its KV and the logits [R, V] of the sampled tokens. Ends with a barrier."""
    _begin(model, step, rank, ranks)
    for index in range(load_int64(model + 8 * M_LAYERS)):
        _layer(model, step, index, rank, ranks)
    rows = load_int64(step + 8 * S_SAMPLED)
    if rows == 0:
        return
    x, stride = load_int64(step + 8 * S_X), load_int64(step + 8 * S_X_STRIDE)
    if load_int64(step + 8 * S_NARROW):
        x = load_int64(step + 8 * S_NARROWED)
    final = load_int64(model + 8 * M_FINAL_WEIGHT)
    if final:
        normed = load_int64(step + 8 * S_NORMED)
        _normalize(model, step, x, normed, rows, final, load_int64(model + 8 * M_FINAL_BIAS), rank, ranks)
        x = normed
    project = load_int64(model + 8 * M_PROJECT_OUT)
    if project:
        embedded, embedded_stride = load_int64(step + 8 * S_EMBEDDED), load_int64(step + 8 * S_EMBEDDED_STRIDE)
        _multiply(model, step, project, x, stride, rows, embedded, embedded_stride, 0, rank, ranks)
        x, stride = embedded, embedded_stride
    logits, logits_stride = load_int64(step + 8 * S_LOGITS), load_int64(step + 8 * S_LOGITS_STRIDE)
    _multiply(model, step, load_int64(model + 8 * M_HEAD), x, stride, rows, logits, logits_stride, 0, rank, ranks)
