"""What blocks do beside attention: which implementation a model gets, that kernels lower for it, and on a Hopper GPU or
in Pallas' interpreter of GPUs that both agree."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.diagnose import first_bad_layer
from osjax.kernels.attention_ref import reference_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.operations import BY_KERNELS, BY_XLA, E4M3, FOR_SAMPLING, Operations, operations_for
from osjax.models.quantized import QuantizedLinear, Rounded, quantize, rounded
from osjax.models.rngs import ModuleRngs
from osjax.models.rope import Rope, rope_table
from osjax.models.streamed import cut
from tests.osjax.kernels.hopper import hopper, interpreted

CONFIG = MMDiTConfig(
    vec_in_dim=32, context_in_dim=48, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3, mlp_ratio=3.0
)
TEXT, GRID = 20, (2, 5, 6)
TOKENS = int(np.prod(GRID))


def model(precision: str) -> MMDiT:
    return quantize(MMDiT(CONFIG, rngs=ModuleRngs(0), dtype=jnp.bfloat16), precision)


def forward(mmdit: MMDiT, *inputs: jax.Array, operations: Operations) -> jax.Array:
    img_bnc, txt_blc, vec_bp, t_b, cos, sin, cond_bnc = inputs
    rope = Rope(cos, sin)
    return mmdit(img_bnc, txt_blc, vec_bp, t_b, rope, reference_attention, cond_bnc, operations=operations)


def inputs() -> list[jax.Array]:
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
    ids = np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), -1).reshape(1, TOKENS, 3)
    rope = rope_table(ids, CONFIG.axes_dim, CONFIG.theta)
    shapes = [(2, TOKENS, CONFIG.in_channels), (2, TEXT, 48), (2, 32)]
    found = [draw(seed, *shape) for seed, shape in enumerate(shapes)]
    return [*found, jnp.full((2,), 0.5), *map(jnp.asarray, rope), draw(3, 2, TOKENS, CONFIG.cond_channels)]


@pytest.mark.parametrize(
    ("changes", "attention", "precision", "chosen"),
    [
        ({}, "pallas", "fp8", BY_KERNELS),
        ({}, "pallas", "full", FOR_SAMPLING),
        ({}, "pallas", "int8", FOR_SAMPLING),
        ({}, "fp8", "fp8", BY_KERNELS),
        ({}, "fp8", "full", FOR_SAMPLING),
        ({}, "cudnn", "fp8", FOR_SAMPLING),
        ({}, "xla", "fp8", FOR_SAMPLING),
        ({"num_heads": 48, "axes_dim": (16, 24, 24)}, "pallas", "fp8", FOR_SAMPLING),  # heads of 64
        ({"hidden_size": 384, "num_heads": 3}, "pallas", "fp8", FOR_SAMPLING),  # three heads are no whole tiles
        ({"mlp_ratio": 4.01}, "pallas", "fp8", FOR_SAMPLING),
    ],
)
def test_a_model_gets_kernels_if_they_know_its_sizes(
    changes: dict, attention: str, precision: str, chosen: Operations
) -> None:
    assert operations_for(dataclasses.replace(MMDiTConfig(), **changes), attention, precision) is chosen


def lowered_block(operations: Operations, precision: str) -> str:
    """A single block for CUDA."""
    layers = nnx.eval_shape(lambda: cut(model(precision)))
    x = jax.ShapeDtypeStruct((2, TEXT + TOKENS, CONFIG.hidden_size), jnp.bfloat16)
    rope = Rope(*[jax.ShapeDtypeStruct((1, TEXT + TOKENS, CONFIG.head_dim // 2), jnp.float32)] * 2)
    vec = jax.ShapeDtypeStruct((2, CONFIG.hidden_size), jnp.bfloat16)

    def block(layer: nnx.Module, x: jax.Array, vec: jax.Array, rope: Rope) -> jax.Array:
        return layer(x, vec, rope, reference_attention, operations)

    return jax.jit(block).trace(layers.single[0], x, vec, rope).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("operations", "precision", "kernels"),
    [
        (FOR_SAMPLING, "full", 0),
        (BY_KERNELS, "full", 3),
        (BY_KERNELS, "fp8", 3),
    ],
)
def test_products_of_a_block_lower_for_cuda(operations: Operations, precision: str, kernels: int) -> None:
    assert lowered_block(operations, precision).count("custom_call @mosaic_gpu") == kernels


def test_the_kernel_refuses_positions_of_each_row() -> None:
    rope = Rope(*[jnp.zeros((2, 3, CONFIG.head_dim // 2))] * 2)
    with pytest.raises(ValueError, match="not by 2 tables"):
        BY_KERNELS.heads(jnp.zeros((2, 3, CONFIG.hidden_size), jnp.bfloat16), model("full").single_blocks.qkv, rope)


def test_a_hidden_layer_in_8_bits_is_never_there_in_16() -> None:
    wide = f"x{TEXT + TOKENS}x{CONFIG.mlp_hidden}x"
    assert f"{wide}bf16" in lowered_block(BY_KERNELS, "full")
    text = lowered_block(BY_KERNELS, "fp8")
    assert f"{wide}f8E4M3FN" in text
    assert f"{wide}bf16" not in text
    assert f"{wide}f32" not in text


def projection() -> QuantizedLinear:
    """Into the hidden layer."""
    rng = np.random.default_rng(0)
    shape = (CONFIG.mlp_hidden, CONFIG.hidden_size)
    kernel = rounded(jnp.asarray(rng.normal(0, shape[1] ** -0.5, shape), jnp.float32), E4M3)
    return QuantizedLinear(kernel, jnp.asarray(rng.normal(0, 0.1, shape[0]), jnp.float32))


@jax.jit
def hidden(x: jax.Array, beside: list[jax.Array]) -> tuple[Rounded, jax.Array]:
    """(a hidden layer in 8 bits, the same in float32)."""
    linear = projection()
    return BY_XLA.hidden(x, linear, beside), jax.nn.gelu(linear(x), approximate=True)


@pytest.mark.parametrize("beside", [0.0, 1.0, 1e4])
def test_a_hidden_layer_is_rounded_within_the_format(beside: float) -> None:
    x = jax.random.normal(jax.random.key(4), (2, 7, CONFIG.hidden_size)) * jnp.exp2(jnp.arange(-3.0, 4))[:, None]
    more = [beside * jax.random.normal(jax.random.key(5), (2, 7, 12))] if beside else []
    (values, scale), want = hidden(x, more)
    got = values.astype(jnp.float32) * scale[..., None]
    # e4m3: half a unit in the last place of 4 bits, and below 2^-6 a unit of 2^-9; a thousandth more for the sums.
    assert (jnp.abs(got - want) <= 1.001 * jnp.maximum(2**-4 * jnp.abs(want), 2**-10 * scale[..., None])).all()
    # What stands beside it is rounded by the same scale and must fit.
    assert all((jnp.abs(each).max(axis=-1) <= 448 * scale * 1.001).all() for each in more)
    # The bound is not so large that numbers of the usual size would be among the smallest.
    assert beside > 1 or (jnp.sqrt(jnp.square(want).mean(axis=-1)) > 2**-3 * scale).all()


def test_a_hidden_layer_in_8_bits_reaches_beyond_float16() -> None:
    """What the type of the streams cannot hold is not cut off on the way: the scale can."""
    wide = 1e4 * jnp.ones((1, 2, CONFIG.hidden_size)) * jnp.sign(jax.random.normal(jax.random.key(6), (256,)))
    (values, scale), want = hidden(64 * wide, [])
    assert jnp.abs(want).max() > jnp.finfo(jnp.float16).max
    (half, half_scale), _ = hidden((wide * 4).astype(jnp.float16), [])
    got, expected = (half.astype(jnp.float32) * half_scale[..., None], values.astype(jnp.float32) * scale[..., None])
    assert jnp.linalg.norm(16 * got - expected) < 2**-4 * jnp.linalg.norm(expected)


def test_a_row_that_is_not_finite_shows_in_a_hidden_layer() -> None:
    x = jnp.ones((1, 3, CONFIG.hidden_size)).at[0, 1, 5].set(jnp.inf)
    (values, scale), _ = hidden(x, [])
    finite = jnp.isfinite(values.astype(jnp.float32) * scale[..., None]).all(axis=-1)
    assert finite.tolist() == [[True, False, True]]


# Sums of 256 float32 products in another order. In fp8 a difference may round an activation to the other side, 2^-4 of
# it.
@pytest.mark.parametrize(("precision", "tolerance"), [("full", 1e-5), ("int8", 1e-5), ("fp8", 0.02)])
def test_modulations_of_all_layers_at_once_are_those_of_each(precision: str, tolerance: float) -> None:
    mmdit = quantize(MMDiT(CONFIG, rngs=ModuleRngs(0), dtype=jnp.float32), precision)
    given = [each.astype(jnp.float32) for each in inputs()]
    each, at_once = (
        jax.jit(functools.partial(forward, operations=operations))(mmdit, *given)
        for operations in (BY_XLA, FOR_SAMPLING)
    )
    assert jnp.linalg.norm(at_once - each) / jnp.linalg.norm(each) < tolerance


@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_kernels_agree_with_xla(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mmdit, given = model(precision), inputs()
    by_xla = jax.jit(functools.partial(forward, operations=BY_XLA))(mmdit, *given)
    with contextlib.nullcontext() if hopper() else interpreted(monkeypatch):
        by_kernels = jax.jit(functools.partial(forward, operations=BY_KERNELS))(mmdit, *given)
    # Both round activations to bfloat16 (2^-9) at other places, five blocks deep; in fp8 a rounding that falls to the
    # other side moves an activation by 2^-4 of itself.
    error = jnp.linalg.norm((by_xla - by_kernels).astype(jnp.float32)) / jnp.linalg.norm(by_xla.astype(jnp.float32))
    assert error < (0.02 if precision == "full" else 0.06)


def test_a_layer_that_is_not_finite_is_found_through_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    mmdit, given = model("full"), inputs()
    kernel = mmdit.single_blocks.mlp_in.kernel
    kernel[...] = kernel[...].at[1, 0, 0].set(jnp.inf)
    run = jax.jit(functools.partial(forward, operations=BY_KERNELS))
    with contextlib.nullcontext() if hopper() else interpreted(monkeypatch):
        assert first_bad_layer(mmdit, lambda watched: run(watched, *given)) == "in single block 2"
