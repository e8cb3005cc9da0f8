"""A step of the denoising loop by an MMDiT in parts: every branch goes through a block before the next one.

A block that comes from host memory crosses the bus once a step, however many branches there are, and while the block
before it is at work. What is computed is what `euler_step` computes, in several compiled parts in place of one.

B batch, N image tokens, L text tokens, M = L + N, C channels of a token, F features, K guidance branches.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osjax.models.mmdit import MMDiT, Streams
from osjax.models.rope import Rope, after_text
from osjax.models.streamed import StreamedMMDiT
from osjax.parallel.specs import SPECS
from osjax.parallel.ulysses import JointSequence
from osjax.sampling.caching import Kept, is_due
from osjax.sampling.step import Branches, Where, everywhere, joint_attention, moved

TOKENS = SPECS.tokens_bnc


class _Started(NamedTuple):
    """Branches behind the first block, by their numbers, where passes may be cut short. after_knf: their image streams;
    first_knf: what the block added to these; due: both streams of those whose other blocks are to be computed."""

    after_knf: dict[int, jax.Array]
    first_knf: dict[int, jax.Array]
    due: dict[int, Streams]


def streamed_step(
    model: StreamedMMDiT,
    x_bnc: jax.Array,
    branches: Branches,
    rope: Rope,
    weights_kn: jax.Array,
    order_k: np.ndarray,
    count: np.ndarray,
    level: np.ndarray,
    next_level: np.ndarray,
    guidance_b: jax.Array | None,
    cache: Kept | None = None,
    limit: np.ndarray | None = None,
    valid_bn: jax.Array | None = None,
    *,
    sequence: JointSequence,
    where: Where,
) -> tuple[jax.Array, jax.Array, Kept | None, int]:
    """As `osjax.sampling.step.euler_step`, whose arguments and results these are."""
    active = [int(number) for number in order_k[: int(count)]]
    means = {"sequence": sequence, "where": where}
    streams, vec_kbf = {}, {}
    for k in active:
        *streams[k], vec_kbf[k] = _enter(model.rest, x_bnc, branches, np.int32(k), level, guidance_b, where=where)
    through = functools.partial(_through_blocks, model, rope=rope, vec_kbf=vec_kbf, means=means)
    if cache is None:
        out_knf, in_full = through(streams, 0), len(active)
    else:
        started = _first_block(model, streams, vec_kbf, rope, (cache, limit, valid_bn), means)
        in_full = len(started.due)
        cache, out_knf = _kept_or_added(cache, started, through(started.due, 1))
    velocity_bnc = jnp.zeros_like(x_bnc)
    for place, k in enumerate(active):
        weights_n = _of_branch(weights_kn, np.int32(place))
        velocity_bnc = _add(model.rest, velocity_bnc, out_knf.pop(k), vec_kbf[k], weights_n, where=where)
    x_bnc, finite = _move(x_bnc, velocity_bnc, level, next_level, where=where)
    return x_bnc, finite, cache, in_full


def _through_blocks(
    model: StreamedMMDiT,
    streams: dict[int, Streams],
    start: int,
    *,
    rope: Rope,
    vec_kbf: dict[int, jax.Array],
    means: dict[str, Any],
) -> dict[int, jax.Array]:
    """The image streams [B, N, F] behind the last block, of branches that are in front of block `start`.

    `streams` is emptied on the way: what is not needed any more must not stay.
    """
    if not streams:
        return {}
    pace, order, text_slice = _Pace(), list(streams), means["sequence"].text_slice
    doubles, last = len(model.layers.double), model.depth - 1
    joint_rope, joint = _behind_text(rope, text_slice, where=means["where"]), {}
    for index in range(start, model.depth):
        pace.wait()
        block = model.block(index, then=index + 1 if index < last else 0)
        for k in order:
            if index < doubles:
                *streams[k], done = through_double(block, *streams.pop(k), vec_kbf[k], rope, **means)
            else:
                x_bmf = joint.pop(k) if k in joint else _join(*streams.pop(k), where=means["where"])
                joint[k], done = through_single(block, x_bmf, vec_kbf[k], joint_rope, **means)
        pace.add(done)
    if not joint:
        return {k: img_bnf for k, (img_bnf, _) in streams.items()}
    return {k: _image_of(joint.pop(k), text_slice, where=means["where"]) for k in order}


class _Pace:
    """Lets the host be two blocks ahead of the devices, no more: what it has asked for holds memory already.

    One ahead would leave the devices idle between blocks; and a copy must be asked for before the computation that it
    is to go beside, because it waits for all that was asked for earlier.
    """

    def __init__(self) -> None:
        self._ends: deque[jax.Array] = deque()

    def wait(self) -> None:
        if len(self._ends) == 2:
            self._ends.popleft().block_until_ready()

    def add(self, end: jax.Array) -> None:
        self._ends.append(end)


def _first_block(
    model: StreamedMMDiT,
    streams: dict[int, Streams],
    vec_kbf: dict[int, jax.Array],
    rope: Rope,
    caching: tuple[Kept, np.ndarray, jax.Array],
    means: dict[str, Any],
) -> _Started:
    cache, limit, valid_bn = caching
    block = model.block(0, then=1 if model.depth > 1 else None)
    after, texts, first, full = {}, {}, {}, {}
    for k in list(streams):
        kept = _of_branch(cache, np.int32(k))
        after[k], texts[k], first[k], full[k] = _first(
            block, *streams.pop(k), vec_kbf[k], rope, kept, limit, valid_bn, **means
        )
    full = jax.device_get(full)
    # Copies: the memory of streams is handed on from block to block.
    return _Started(after, first, {k: (jnp.copy(after[k]), texts[k]) for k in after if full[k]})


def _kept_or_added(
    cache: Kept, started: _Started, computed_knf: dict[int, jax.Array]
) -> tuple[Kept, dict[int, jax.Array]]:
    """What is kept now, and the image streams behind the last block: computed, or by what the blocks added before."""
    out_knf = {}
    for k, after_bnf in started.after_knf.items():
        if k in computed_knf:
            out_knf[k] = computed_knf[k]
            cache = _remember(cache, np.int32(k), started.first_knf[k], out_knf[k], after_bnf)
        else:
            out_knf[k] = _add_again(cache, np.int32(k), after_bnf)
    return cache, out_knf


def _mapped(function: Callable[..., Any], where: Where, ins: tuple[Any, ...], outs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=where.mesh, in_specs=ins, out_specs=outs, check_vma=False)


@functools.partial(jax.jit, static_argnames="where")
def _enter(
    rest: MMDiT,
    x_bnc: jax.Array,
    branches: Branches,
    k: jax.Array,
    level: jax.Array,
    guidance_b: jax.Array | None,
    *,
    where: Where,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `MMDiT.embed` gives for branch k."""
    one = _of_branch(branches, k)
    time_b = jnp.full(x_bnc.shape[:1], level, jnp.float32)
    optional = None if one.cond_kbnc is None else TOKENS, None if guidance_b is None else SPECS.rows_b
    ins = (SPECS.everywhere, TOKENS, TOKENS, SPECS.rows_bc, SPECS.rows_b, *optional)
    embed = _mapped(lambda rest, *given: rest.embed(*given), where, ins, (TOKENS, TOKENS, SPECS.rows_bc))
    return embed(rest, x_bnc, one.txt_kblc, one.vec_kbp, time_b, one.cond_kbnc, guidance_b)


@functools.partial(jax.jit, static_argnames=("sequence", "where"), donate_argnames=("img_bnf", "txt_blf"))
def through_double(
    block: nnx.Module,
    img_bnf: jax.Array,
    txt_blf: jax.Array,
    vec_bf: jax.Array,
    rope: Rope,
    *,
    sequence: JointSequence,
    where: Where,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both streams behind a double block, and a number that is there when they are."""
    attention = joint_attention(sequence, where)
    run = _mapped(
        lambda block, *given: block(*given, attention, where.operations),
        where,
        (SPECS.everywhere, TOKENS, TOKENS, SPECS.rows_bc, SPECS.rope_1nd),
        (TOKENS, TOKENS),
    )
    img_bnf, txt_blf = run(block, img_bnf, txt_blf, vec_bf, rope)
    return img_bnf, txt_blf, img_bnf[0, 0, 0]


@functools.partial(jax.jit, static_argnames=("sequence", "where"))
def _first(
    block: nnx.Module,
    img_bnf: jax.Array,
    txt_blf: jax.Array,
    vec_bf: jax.Array,
    rope: Rope,
    kept: Kept,
    limit: jax.Array,
    valid_bn: jax.Array,
    *,
    sequence: JointSequence,
    where: Where,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Both streams behind the first block, what it added to the image's, and whether the others are to be computed."""
    attention = joint_attention(sequence, where)

    def run(block, img_bnf, txt_blf, vec_bf, rope, kept, limit, valid_bn):
        after_bnf, txt_blf = block(img_bnf, txt_blf, vec_bf, rope, attention, where.operations)
        first_bnf = after_bnf - img_bnf
        return after_bnf, txt_blf, first_bnf, is_due(kept, first_bnf, limit, valid_bn, everywhere)

    of_branch = Kept(TOKENS, TOKENS, SPECS.everywhere)
    streams = (TOKENS, TOKENS, SPECS.rows_bc, SPECS.rope_1nd)
    ins = (SPECS.everywhere, *streams, of_branch, SPECS.everywhere, SPECS.tokens_bn)
    outs = (TOKENS, TOKENS, TOKENS, SPECS.everywhere)
    return _mapped(run, where, ins, outs)(block, img_bnf, txt_blf, vec_bf, rope, kept, limit, valid_bn)


def through_single(
    block: nnx.Module, x_bmf: jax.Array, vec_bf: jax.Array, rope: Rope, *, sequence: JointSequence, where: Where
) -> tuple[jax.Array, jax.Array]:
    """The joint stream behind a single block, and a number that is there when it is. rope: over the M tokens."""
    run = _single_in_place if where.operations.in_place else _single_anew
    return run(block, x_bmf, vec_bf, rope, sequence=sequence, where=where)


def _single(
    block: nnx.Module, x_bmf: jax.Array, vec_bf: jax.Array, rope: Rope, *, sequence: JointSequence, where: Where
) -> tuple[jax.Array, jax.Array]:
    attention = joint_attention(sequence, where)
    run = _mapped(
        lambda block, *given: block(*given, attention, where.operations),
        where,
        (SPECS.everywhere, TOKENS, SPECS.rows_bc, SPECS.rope_1nd),
        TOKENS,
    )
    x_bmf = run(block, x_bmf, vec_bf, rope)
    return x_bmf, x_bmf[0, 0, 0]


_single_anew = jax.jit(_single, static_argnames=("sequence", "where"))
_single_in_place = jax.jit(_single, static_argnames=("sequence", "where"), donate_argnames="x_bmf")


@functools.partial(jax.jit, static_argnames=("text", "where"))
def _behind_text(rope: Rope, text: int, *, where: Where) -> Rope:
    """The table of the joint sequence, each device's part behind its `text` text tokens."""
    return _mapped(lambda rope: after_text(rope, text), where, (SPECS.rope_1nd,), SPECS.rope_1nd)(rope)


@functools.partial(jax.jit, static_argnames="where")
def _join(img_bnf: jax.Array, txt_blf: jax.Array, *, where: Where) -> jax.Array:
    """The joint stream [B, M, F]: on each device its text, then its image."""
    join = lambda img_bnf, txt_blf: jnp.concatenate([txt_blf, img_bnf], axis=1)  # noqa: E731
    return _mapped(join, where, (TOKENS, TOKENS), TOKENS)(img_bnf, txt_blf)


@functools.partial(jax.jit, static_argnames=("text", "where"))
def _image_of(x_bmf: jax.Array, text: int, *, where: Where) -> jax.Array:
    """The image stream of a joint one; text: text tokens on each device."""
    return _mapped(lambda x_bmf: x_bmf[:, text:], where, (TOKENS,), TOKENS)(x_bmf)


@functools.partial(jax.jit, static_argnames="where", donate_argnames="velocity_bnc")
def _add(
    rest: MMDiT, velocity_bnc: jax.Array, x_bnf: jax.Array, vec_bf: jax.Array, weights_n: jax.Array, *, where: Where
) -> jax.Array:
    """The sum of velocities with a branch's own in it, by its weights [N]."""
    final = _mapped(lambda layer, *given: layer(*given), where, (SPECS.everywhere, TOKENS, SPECS.rows_bc), TOKENS)
    return velocity_bnc + weights_n[None, :, None] * final(rest.final_layer, x_bnf, vec_bf).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="where", donate_argnames="x_bnc")
def _move(
    x_bnc: jax.Array, velocity_bnc: jax.Array, level: jax.Array, next_level: jax.Array, *, where: Where
) -> tuple[jax.Array, jax.Array]:
    return moved(x_bnc, velocity_bnc, level, next_level, where.mesh)


@jax.jit
def _of_branch(stacked: Any, k: jax.Array) -> Any:
    """Branch k of arrays with K in front."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, k, keepdims=False), stacked)


@functools.partial(jax.jit, donate_argnames="cache")
def _remember(cache: Kept, k: jax.Array, first_bnf: jax.Array, out_bnf: jax.Array, after_bnf: jax.Array) -> Kept:
    new = Kept(first_bnf, out_bnf - after_bnf, jnp.ones((), bool))
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, k, 0), cache, new)


@jax.jit
def _add_again(cache: Kept, k: jax.Array, after_bnf: jax.Array) -> jax.Array:
    """The image stream of branch k with what the other blocks added when they were computed last."""
    return after_bnf + _of_branch(cache.others_bnf, k)
