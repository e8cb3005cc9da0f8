"""Weights to start from: a transformer that predicts nothing yet, encoders whose logits are small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax import leaves
from osjax.residency import MODELS
from osjax.training.initial import initialise
from tests.osjax.training import micro

OPTIONS = {
    "mmdit": micro.MMDIT,
    "flux": micro.MMDIT,
    "t5": micro.T5,
    "clip": micro.CLIP,
    "hunyuan_vae": micro.VAE,
    "autoencoder_2d": {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1},
    "dc_ae": {
        "latent_channels": 4,
        **{f"{net}_widths": (8, 32) for net in ("encoder", "decoder")},
        **{f"{net}_depths": (1, 1) for net in ("encoder", "decoder")},
        **{f"{net}_attention": (False, True) for net in ("encoder", "decoder")},
        **{f"{net}_time": (True, False) for net in ("encoder", "decoder")},
    },
}


def config_of(kind, **changed):
    fields = {name: value for name, value in OPTIONS[kind].items() if name not in ("kind", "max_length")}
    return MODELS[kind][1](**fields | changed)


def module_of(kind, config):
    return nnx.eval_shape(lambda: MODELS[kind][0](config, rngs=nnx.Rngs(0), dtype=jnp.float32))


@pytest.mark.parametrize("kind", MODELS)
def test_every_leaf_is_drawn_and_follows_the_key(kind):
    config = config_of(kind)
    expected = {leaf: array.shape for leaf, array in leaves.flatten(module_of(kind, config)).items()}
    make = jax.jit(lambda key: initialise(kind, config, key))
    first, again, other = (make(jax.random.key(seed)) for seed in (0, 0, 1))
    assert {leaf: array.shape for leaf, array in first.items()} == expected
    assert all(array.dtype == jnp.float32 and np.isfinite(array).all() for array in first.values())
    assert all(np.array_equal(first[leaf], again[leaf]) for leaf in first)
    drawn = [leaf for leaf, array in first.items() if array.ndim > 1 and np.asarray(array).std() > 0]
    assert drawn
    assert not any(np.array_equal(first[leaf], other[leaf]) for leaf in drawn)


def test_a_new_transformer_is_the_identity_and_predicts_nothing():
    weights = initialise("mmdit", config_of("mmdit"), jax.random.key(0))
    zero = {leaf for leaf, array in weights.items() if leaf.endswith("kernel") and not np.asarray(array).any()}
    blocks = ("double_blocks.img", "double_blocks.txt", "single_blocks", "final_layer")
    assert zero == {"final_layer.linear.kernel", *(f"{block}.mod.lin.kernel" for block in blocks)}
    assert not np.asarray(weights["final_layer.linear.bias"]).any()
    assert not any(np.asarray(weights[f"{block}.mod.lin.bias"]).any() for block in blocks)


def test_queries_of_a_new_t5_make_up_for_its_logits_not_being_scaled():
    """LeCun normal has variance 1 / inputs; the queries' is that over d_kv. Of 65,536 numbers, so within 2%."""
    config = config_of("t5", d_model=256, d_kv=16, num_heads=16)
    weights = initialise("t5", config, jax.random.key(0))
    assert np.asarray(weights["blocks.k.kernel"]).std() == pytest.approx(256**-0.5, rel=0.02)
    assert np.asarray(weights["blocks.q.kernel"]).std() == pytest.approx((256 * 16) ** -0.5, rel=0.02)


def test_the_posterior_of_a_new_autoencoder_starts_narrow():
    """A deviation of e^-3 for latents of order 1; means start where the module puts them."""
    config = config_of("hunyuan_vae")
    bias = np.asarray(initialise("hunyuan_vae", config, jax.random.key(0))["encoder.quant_conv.bias"])
    mean, log_variance = np.split(bias, 2)
    assert not mean.any()
    assert (log_variance == -6).all()
