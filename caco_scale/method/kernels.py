"""Triton kernels for the bank on CUDA: similarity, exponential and product in one pass over tiles that stay on chip.

The exponentials of the chunked path never reach memory. They are made twice, because pᵀ q needs Z, the sum over the
rows of all ranks, which is known only after the first pass: :func:`attract` gives Σ e and Σ e u, then :func:`pull`
gives eᵀ q. Sums and accumulators are fp32; ``inputs`` says what the matrix products read: "fp32", "tf32" or "bf16".

The oracle is the dense step in float64, against which they are checked on a GPU and, by
TRITON_INTERPRET=1, on a CPU. On an H100, N = 2,048, K = 65,536, D = 256, they take 0.91 (tf32) and 0.42 (bf16) of the
time of the chunked path in fp32. Other sizes of tiles were not tried there.

Shapes: Q queries (N·V), S own rows, D embedding.
"""

import math
import os

import torch
import triton
import triton.language as tl

# Queries and rows of a tile, warps of a program, stages of its loop: chosen so that for D = 256 the shared memory stays
# below 99 KiB, which every GPU since Ampere has, and no register spills (compiled for sm_80 and sm_90, run on sm_90).
TILES = {"fp32": (32, 4, 1), "tf32": (32, 4, 1), "bf16": (64, 8, 2)}
LOG2_E = math.log2(math.e)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton.jit decides, when it reads this module


def attract(query, unit, temperatures, inputs):
    """Σ e (Q, temperatures) and Σ e u at the first temperature (Q, D), e = exp(q·u / T), over the rows (S, D)."""
    first, last = temperatures[0], temperatures[-1]
    sums = query.new_zeros(len(query), len(temperatures))
    attracted = torch.zeros_like(query)
    q, u = _as_input(query * (LOG2_E / first), inputs), _as_input(unit, inputs)
    if len(unit):
        _attract[(triton.cdiv(len(q), TILES[inputs][0]),)](
            *(q, u, sums, attracted, len(q), len(u), q.shape[1], first / last),
            NUM_SUMS=len(temperatures),
            **_options(q.shape[1], inputs),
        )
    return sums, attracted


def pull_(pull, query, weighted, unit, temperature, inputs):
    """Add eᵀ weighted to ``pull`` (S, D), in place; ``weighted`` (Q, D) are the queries (Q, D) divided by Z."""
    q, u = _as_input(query * (LOG2_E / temperature), inputs), _as_input(unit, inputs)
    if len(unit):
        _pull[(triton.cdiv(len(u), TILES[inputs][0]),)](
            *(q, _as_input(weighted, inputs), u, pull, len(q), len(u), q.shape[1]),
            **_options(q.shape[1], inputs),
        )


def nearest(keys, unit, inputs):
    """For each key (Q, D) the largest similarity with a row and the lowest such row: (Q,) fp32 and (Q,) int64."""
    values = keys.new_full((len(keys),), -math.inf)
    rows = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
    if len(unit):
        k, u = _as_input(keys, inputs), _as_input(unit, inputs)
        _nearest[(triton.cdiv(len(k), TILES[inputs][0]),)](
            *(k, u, values, rows, len(k), len(u), k.shape[1]), **_options(k.shape[1], inputs)
        )
    return values, rows


def _as_input(x, inputs):
    """What the matrix products read, rounded to nearest: tensor cores cut tf32's low bits off, twice the error."""
    if inputs == "bf16":
        return x.bfloat16().contiguous()
    if inputs == "tf32":  # 10 bits of mantissa, by Veltkamp's splitting, through which NaN stays NaN
        high = x * (2**13 + 1)
        return (high - (high - x)).contiguous()
    return x.contiguous()


def _options(dim, inputs):
    block, warps, stages = TILES[inputs]
    blocks = {"BLOCK_Q": block, "BLOCK_S": block, "BLOCK_D": max(16, triton.next_power_of_2(dim))}
    precision = {"PRECISION": "tf32" if inputs == "tf32" else "ieee", "EMULATE": INTERPRETED}
    return {**blocks, **precision, "num_warps": warps, "num_stages": stages}


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """a b with fp32 accumulation. Triton's interpreter (EMULATE) multiplies fp32 only.

    Products of bf16 or tf32 numbers are exact in fp32, so that this is what tensor cores compute.
    """
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rounded(e, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Exponentials for the next product: as :func:`_as_input`. A NaN among them shows in their sum."""
    if PRECISION == "tf32":
        e = ((e.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return e.to(dtype)


@triton.jit
def _load(pointer, rows, num_rows, dim, BLOCK_D: tl.constexpr):
    """Some rows of a contiguous (num_rows, dim) matrix: (len(rows), BLOCK_D), zero outside."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_rows) & (dims[None, :] < dim)
    return tl.load(pointer + rows[:, None].to(tl.int64) * dim + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, values, rows, num_rows, dim, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_rows) & (dims[None, :] < dim)
    tl.store(pointer + rows[:, None].to(tl.int64) * dim + dims[None, :], values, mask=inside)


@triton.jit
def _attract(
    query,
    unit,
    sums,
    attracted,
    num_queries,
    num_rows,
    dim,
    ratio,
    NUM_SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load(query, queries, num_queries, dim, BLOCK_D)
    z = tl.zeros((BLOCK_Q,), tl.float32)
    z_bank = tl.zeros((BLOCK_Q,), tl.float32)
    o = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, num_rows, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        u = _load(unit, rows, num_rows, dim, BLOCK_D)
        x = _dot(q, tl.trans(u), PRECISION, EMULATE)
        inside = rows[None, :] < num_rows
        e = tl.where(inside, tl.exp2(x), 0.0)
        z += tl.sum(e, 1)
        o += _dot(_rounded(e, u.dtype, PRECISION), u, PRECISION, EMULATE)
        if NUM_SUMS == 2:
            z_bank += tl.sum(tl.where(inside, tl.exp2(x * ratio), 0.0), 1)
    tl.store(sums + queries * NUM_SUMS, z, mask=queries < num_queries)
    if NUM_SUMS == 2:
        tl.store(sums + queries * NUM_SUMS + 1, z_bank, mask=queries < num_queries)
    _store(attracted, o, queries, num_queries, dim, BLOCK_D)


@triton.jit
def _pull(
    query,
    weighted,
    unit,
    pull,
    num_queries,
    num_rows,
    dim,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    u = _load(unit, rows, num_rows, dim, BLOCK_D)
    a = _load(pull, rows, num_rows, dim, BLOCK_D)
    for start in range(0, num_queries, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        q = _load(query, queries, num_queries, dim, BLOCK_D)
        w = _load(weighted, queries, num_queries, dim, BLOCK_D)  # zero after the last query
        e = tl.exp2(_dot(u, tl.trans(q), PRECISION, EMULATE))
        a += _dot(_rounded(e, w.dtype, PRECISION), w, PRECISION, EMULATE)
    _store(pull, a, rows, num_rows, dim, BLOCK_D)


@triton.jit
def _nearest(
    keys,
    unit,
    values,
    rows_found,
    num_keys,
    num_rows,
    dim,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k = _load(keys, queries, num_keys, dim, BLOCK_D)
    best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    found = tl.zeros((BLOCK_Q,), tl.int64)
    for start in range(0, num_rows, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        u = _load(unit, rows, num_rows, dim, BLOCK_D)
        s = _dot(k, tl.trans(u), PRECISION, EMULATE)
        s = tl.where(rows[None, :] < num_rows, s, float("-inf"))
        value, row = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        found = tl.where(value > best, (start + row).to(tl.int64), found)
        best = tl.where(value > best, value, best)
    tl.store(values + queries, best, mask=queries < num_keys)
    tl.store(rows_found + queries, found, mask=queries < num_keys)
