"""LoRA: beside the weights equals merged into them; a new one changes nothing; only A and B are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osjax.errors import OsjaxError
from osjax.kernels.attention_ref import reference_attention
from osjax.models import lora
from osjax.models.lora import Factors, LoRA
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rope import rope_table

MICRO = MMDiTConfig(
    in_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)
TARGETS = ("qkv.lin", "proj", "mlp_in", "mlp_out", "out", "img_in")
# Float32 sums of a few hundred terms, in another order: some ten roundings of 6e-8, of the largest value.
ROUNDING = 2e-6
# The same carried through four blocks.
MODEL_ROUNDING = 2e-5

merge = jax.jit(lora.merge)  # one compilation in place of one for every operation


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return jax.jit(lambda: MMDiT(MICRO, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def adapter(model) -> LoRA:
    return random(new_adapter(model))


@jax.jit
def new_adapter(model: MMDiT) -> LoRA:
    return lora.init(model, 4, 8.0, TARGETS, jax.random.key(0))


def random(adapter: LoRA, seed: int = 1) -> LoRA:
    """The adapter with random factors, B among them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda each: jnp.asarray(rng.normal(0, 0.1, each.shape), each.dtype), adapter)


@functools.partial(jax.jit, static_argnames="remat")
def velocity(model: MMDiT, remat: bool = False) -> jax.Array:
    """The micro model on fixed inputs: [1, 6, 8]."""
    ids = np.zeros((1, 6, 3), np.int32)
    ids[0, :, 1] = np.arange(6)
    draw = functools.partial(np.random.default_rng(2).normal)
    tokens, text, vec, cond = (
        draw(size=shape).astype(np.float32) for shape in ((1, 6, 8), (1, 3, 8), (1, 8), (1, 6, 12))
    )
    rope = rope_table(ids, MICRO.axes_dim, MICRO.theta)
    return model(tokens, text, vec, np.full(1, 0.3, np.float32), rope, reference_attention, cond, remat=remat)


def assert_near(actual, expected, tolerance: float) -> None:
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def assert_same(actual: nnx.Module, expected: nnx.Module) -> None:
    ours, theirs = jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree_util.tree_flatten_with_path(expected)[0]
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    assert all((a == b).all() for (_, a), (_, b) in zip(ours, theirs, strict=True))


class Two(nnx.Module):
    """Both classes of projections; `layers` > 0 stacks them."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.flat = nnx.Linear(inputs, outputs[0], rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.general = nnx.LinearGeneral(inputs, outputs, rngs=rngs, dtype=dtype, param_dtype=dtype)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.flat(x), self.general(x)


@given(
    inputs=st.integers(1, 9),
    outputs=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    layers=st.integers(0, 3),
    adapters=st.lists(st.tuples(st.integers(1, 5), st.floats(-2, 2)), min_size=1, max_size=3),
)
@settings(max_examples=8, deadline=None)
def test_beside_equals_merged_for_any_shape_and_stack(inputs, outputs, layers, adapters):
    ranks, weights = zip(*adapters, strict=True)

    def outputs_of(weights, x):
        rngs = nnx.Rngs(0)
        module = (
            nnx.vmap(lambda rngs: Two(inputs, outputs, rngs))(rngs.split(layers))
            if layers
            else Two(inputs, outputs, rngs)
        )
        run = jax.vmap(lambda each: each(x)) if layers else lambda each: each(x)
        made = [
            random(lora.init(module, rank, 3.0, ["flat", "general"], jax.random.key(0)), seed)
            for seed, rank in enumerate(ranks)
        ]
        stacked = lora.stack(zip(made, weights, strict=True))
        one_by_one = module
        for adapter, weight in zip(made, weights, strict=True):
            one_by_one = lora.merge(one_by_one, lora.stack([(adapter, weight)]))
        return run(lora.attach(module, stacked)), run(lora.merge(module, stacked)), run(one_by_one)

    x = np.random.default_rng(3).normal(size=(2, inputs)).astype(np.float32)
    beside, merged, one_by_one = jax.jit(outputs_of)(weights, x)
    jax.tree.map(lambda a, b: assert_near(a, b, ROUNDING), (beside, one_by_one), (merged, merged))


def test_beside_equals_merged_in_the_model(model, adapter):
    beside, merged = velocity(lora.attach(model, adapter)), velocity(merge(model, adapter))
    assert_near(beside, merged, MODEL_ROUNDING)
    assert np.abs(beside - velocity(model)).max() > 0.01, "the adapter shows"


def test_a_new_adapter_changes_nothing(model):
    new = new_adapter(model)
    assert_same(merge(model, new), model)
    np.testing.assert_array_equal(velocity(lora.attach(model, new)), velocity(model))


def test_the_model_itself_is_left_alone(model, adapter):
    before = jax.tree.map(np.array, model)
    attached = lora.attach(model, adapter)
    merge(model, adapter)
    assert_same(model, before)
    assert_same(lora.detach(attached), before)
    assert isinstance(attached.double_blocks.img.proj, lora.LoRALinear)
    assert not any(isinstance(each, lora.LoRALinear) for _, each in nnx.iter_modules(lora.detach(attached)))


def test_merging_sums_in_float32_and_keeps_the_dtype():
    module = Two(8, (16,), nnx.Rngs(0), jnp.bfloat16)
    made = random(lora.init(module, 2, 2.0, ["flat"], jax.random.key(0)))
    merged = lora.merge(module, made).flat.kernel.get_value()
    a, b = made.factors["flat"]
    exact = np.asarray(module.flat.kernel.get_value(), np.float64) + np.asarray(a, np.float64) @ np.asarray(
        b, np.float64
    )
    assert merged.dtype == jnp.bfloat16
    # Half a unit in the last place of bf16 (2⁻⁸ of the value at most), and float32's own rounding.
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-6).all()


def test_beside_bf16_weights_the_factors_stay_float32():
    module = Two(8, (16,), nnx.Rngs(0), jnp.bfloat16)
    attached = lora.attach(module, lora.init(module, 2, 2.0, ["flat"], jax.random.key(0)))
    assert attached.flat.a.get_value().dtype == jnp.float32
    assert attached.flat(jnp.ones((1, 8), jnp.bfloat16)).dtype == jnp.bfloat16


@functools.partial(jax.jit, static_argnames="remat")
def gradient_of(adapter: LoRA, model: MMDiT, remat: bool) -> LoRA:
    return jax.grad(lambda adapter: jnp.square(velocity(lora.attach(model, adapter), remat)).mean())(adapter)


@pytest.fixture(scope="module")
def gradient(model, adapter):
    return gradient_of(adapter, model, remat=False)


def test_gradients_reach_a_and_b_and_nothing_else(gradient, adapter):
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter), "frozen weights have no gradient"
    for name, array in gradient.arrays.items():
        assert np.abs(array).max() > 0, name


def test_gradients_are_the_same_sharded_and_with_blocks_computed_again(gradient, model, adapter):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(each):
        wide = each.ndim >= 2 and each.shape[-2] % 4 == 0
        return jax.device_put(each, NamedSharding(mesh, P(*(None,) * (each.ndim - 2), "fsdp", None) if wide else P()))

    sharded = gradient_of(jax.tree.map(place, adapter), jax.tree.map(place, model), remat=True)
    jax.tree.map(lambda a, b: assert_near(a, b, MODEL_ROUNDING), sharded, gradient)


def test_gradients_are_those_through_the_merged_weights():
    module = Two(8, (3, 4), nnx.Rngs(0))
    made = random(lora.init(module, 2, 6.0, ["flat", "general"], jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)

    def loss(adapter, use):
        return sum(jnp.sin(each).sum() for each in use(module, adapter)(x))

    beside, merged = jax.jit(lambda made: [jax.grad(loss)(made, use) for use in (lora.attach, lora.merge)])(made)
    jax.tree.map(lambda a, b: assert_near(a, b, ROUNDING), beside, merged)


def test_init_draws_a_as_peft_does(model):
    made = lora.init(model, 3, 12.0, ["proj", "qkv.lin"], jax.random.key(5))
    assert made.scale == 4.0
    assert sorted(made.factors) == [
        "double_blocks.img.proj",
        "double_blocks.img.qkv.lin",
        "double_blocks.txt.proj",
        "double_blocks.txt.qkv.lin",
        "single_blocks.qkv.lin",
    ]
    a, b = made.factors["single_blocks.qkv.lin"]
    assert (a.shape, b.shape) == ((2, 32, 3), (2, 3, 3, 2, 16))
    bound = 1 / np.sqrt(32)
    assert not b.any()
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert np.abs(np.asarray(a[0]) - np.asarray(a[1])).max() > 0, "layers differ"
    again = lora.init(model, 3, 12.0, ["qkv.lin", "proj"], jax.random.key(5))
    assert all((again.arrays[name] == array).all() for name, array in made.arrays.items())


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, ["proj"], "lora.rank is 0"),
        (4, ["proj", "qvk.lin"], r"\(qvk\.lin\): choose last names of .*double_blocks\.img\.qkv\.lin"),
        (4, ["lin_in", "roj"], r"\(lin_in, roj\)"),
        (4, [], "it is empty"),
    ],
)
def test_what_cannot_be_trained(model, rank, targets, message):
    with pytest.raises(OsjaxError, match=message):
        lora.init(model, rank, 1.0, targets, jax.random.key(0))


@pytest.mark.parametrize("use", [lora.attach, lora.merge], ids=lambda use: use.__name__)
def test_what_does_not_fit_is_listed(model, adapter, use):
    factors = dict(adapter.factors)
    factors["double_blocks.img.nothing"] = factors.pop("img_in")
    a, b = factors["single_blocks.out"]
    factors["single_blocks.out"] = Factors(a[:1], b[:1])
    with pytest.raises(OsjaxError, match=r"unknown: double_blocks\.img\.nothing; .*single_blocks\.out is 2×160×32"):
        use(model, LoRA(factors, 1.0))


def test_flat_names_and_back(adapter):
    arrays = adapter.arrays
    assert "double_blocks.img.qkv.lin.b" in arrays
    back = LoRA.of_arrays(arrays, adapter.scale)
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    assert all(back.arrays[name] is array for name, array in arrays.items())


def test_the_published_model_takes_rank_32():
    """Abstractly: 19 + 38 layers, every weight keeps its shape and dtype, and its memory too when it is donated."""
    model = nnx.eval_shape(lambda: MMDiT(MMDiTConfig(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    made = jax.eval_shape(lambda key: lora.init(model, 32, 32.0, TARGETS[:-1], key), jax.random.key(0))
    features, hidden = 3072, 4 * 3072
    double = (features + 3 * features) + 2 * features + 2 * (features + hidden)
    single = (features + 3 * features) + (features + hidden) + (features + hidden + features)
    assert sum(each.size for each in made.arrays.values()) == 32 * (19 * 2 * double + 38 * single)
    merged = jax.eval_shape(lora.merge, model, made)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), merged, model))
    memory = jax.jit(lora.merge, donate_argnums=0).lower(model, made).compile().memory_analysis()
    # The largest leaf, all layers of it, is 0.15 of the model; XLA for CPUs may copy one where GPUs need none.
    assert memory.temp_size_in_bytes < 0.2 * memory.output_size_in_bytes
