"""What a trace says of memory, on functions whose arrays can be counted, and against what the compiler plans."""

import jax
import jax.numpy as jnp
import pytest

from osjax.kernels.attention_ref import reference_attention
from osjax.liveness import peak_bytes, tree_bytes
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rngs import ModuleRngs
from osjax.models.rope import Rope
from osjax.preflight import MARGIN

X = jax.ShapeDtypeStruct((100, 100), jnp.float32)
BYTES = 40_000
MMDIT = MMDiTConfig(
    vec_in_dim=32,
    context_in_dim=48,
    hidden_size=256,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(32, 48, 48),
)
VAE = HunyuanVAEConfig(block_out_channels=(32, 64, 64, 64), layers_per_block=1)


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (lambda x: x @ x, 1),
        (lambda x: (x @ x) @ x, 2),
        (lambda x: jnp.tanh(x * 2 + 1), 1),  # one loop over the elements
        (lambda x: (x @ x).reshape(-1) + 1, 2),
        (lambda x: jnp.square(x).sum(), 1e-4),
        (lambda x: (x @ x, x @ x), 2),
        (jax.jit(lambda x: (x @ x) @ x), 2),
        (lambda x: jax.lax.dynamic_update_slice(x @ x, x[:1], (0, 0)), 1.01),  # a row is exchanged in place
        (lambda x: jax.lax.dynamic_update_slice(x, x[:1], (0, 0)), 1.01),  # but not of what is given
        (lambda x: jax.lax.optimization_barrier((x @ x, x))[0] @ x, 2),
        (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x), 2),  # what comes in and what is made of it
    ],
)
def test_arrays_are_counted_while_they_are_needed(function, arrays):
    assert peak_bytes(function, X) == pytest.approx(arrays * BYTES, rel=0.01)


def test_slices_of_stacked_weights_count_one_at_a_time():
    def layers(w, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    few, many = (peak_bytes(layers, jax.ShapeDtypeStruct((n, 100, 100), jnp.float32), X) for n in (2, 50))
    assert few == many == pytest.approx(3 * BYTES, rel=0.01)


def test_inside_a_shard_map_a_device_holds_its_part():
    mesh = jax.sharding.AbstractMesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("seq")
    part = jax.shard_map(lambda x: jnp.sort(x) @ jnp.ones((100, 100)), mesh=mesh, in_specs=rows, out_specs=rows)
    assert BYTES < peak_bytes(part, X) < 2.6 * BYTES


def abstract(model, config):
    return jax.eval_shape(lambda: model(config, rngs=ModuleRngs(0), dtype=jnp.float32))


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mmdit_case():
    tokens, text = 2000, 64
    angles = f32(1, tokens, MMDIT.head_dim // 2)
    inputs = (f32(1, tokens, 64), f32(1, text, 48), f32(1, 32), f32(1), Rope(angles, angles), f32(1, tokens, 68))
    return lambda m, x, txt, vec, t, rope, cond: m(x, txt, vec, t, rope, reference_attention, cond), (
        abstract(MMDiT, MMDIT),
        *inputs,
    )


def decoder_case():
    return lambda decoder, z: decoder(z), (abstract(HunyuanVAE, VAE).decoder, f32(1, 5, 8, 12, 16))


def encoder_case():
    return lambda encoder, x: encoder(x), (abstract(HunyuanVAE, VAE).encoder, f32(1, 17, 64, 96, 3))


@pytest.mark.parametrize("case", [mmdit_case, decoder_case, encoder_case])
def test_it_bounds_what_the_compiler_plans_from_above_by_less_than_twice(case):
    function, arguments = case()
    planned = jax.jit(function).lower(*arguments).compile().memory_analysis()
    planned = planned.temp_size_in_bytes + planned.output_size_in_bytes
    assert planned <= MARGIN * peak_bytes(function, *arguments) <= 2 * planned


def test_bytes_of_a_tree():
    assert tree_bytes({"a": X, "b": [jnp.zeros(3, jnp.bfloat16)]}) == BYTES + 6
