"""One optimizer step on a linear loss whose gradients are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.training.options import OptimOptions
from osjax.training.state import abstract_start, make_step, start

# Steps of lr 0.1 in float32, with sums of at most eight numbers of order one.
TOLERANCE = 1e-5
KEY = jax.random.key(7)
OPTIONS = OptimOptions(lr=0.1, eps=1e-3, ema_decay=0.9)
ONE, MESH = TrainingMeshShape(), TrainingMeshShape(data=2, fsdp=2, tensor=2)


def weights():
    return {
        "net.blocks.mlp_in.kernel": jnp.arange(48, dtype=jnp.float32).reshape(3, 4, 4) / 48,
        "net.out.kernel": jnp.ones((4, 2)),
        "net.out.bias": jnp.zeros(2),
    }


def linear(trained, frozen, batch, key):
    """Its gradient is what the batch holds, times the frozen scale."""
    loss = sum(jnp.vdot(trained[name], batch[name]) for name in trained) * frozen["scale"]
    return loss, {"drawn": jax.random.uniform(key)}


def batches(count):
    return [
        {name: jax.random.normal(jax.random.fold_in(KEY, 10 * i + j), each.shape) for j, (name, each) in names}
        for i, names in enumerate([list(enumerate(weights().items()))] * count)
    ]


@functools.cache
def compiled(options, mesh):
    """(where the state lies, step)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_start(weights(), options, 10, make_mesh(mesh)))
    return shardings, make_step(linear, options, 10, KEY, shardings)


def opened(options=OPTIONS, mesh=ONE):
    """(state before the first step, step)."""
    shardings, step = compiled(options, mesh)
    return jax.device_put(start(weights(), options, 10), shardings), step


FROZEN = {"scale": jnp.float32(2.0)}


def assert_same(ours, theirs, tolerance=TOLERANCE):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("mesh", [ONE, MESH], ids=str)
def test_several_batches_count_as_their_mean(mesh):
    three = batches(3)
    mean = jax.tree.map(lambda *each: sum(each) / 3, *three)
    state, step = opened(mesh=mesh)
    accumulated, metrics = step(state, FROZEN, three)
    state, step = opened()
    at_once, expected = step(state, FROZEN, [mean])
    assert_same(accumulated.weights, at_once.weights)
    assert_same(accumulated.ema, at_once.ema)
    for name in ("loss", "grad_norm", "lr"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=TOLERANCE)
    assert int(accumulated.step) == int(at_once.step) == 1


def test_norm_is_that_before_clipping():
    (batch,) = batches(1)
    state, step = opened(OptimOptions(clip_norm=1e-3))
    _, metrics = step(state, FROZEN, [batch])
    expected = 2 * np.sqrt(sum(float(jnp.square(each).sum()) for each in batch.values()))
    assert expected > 1
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=TOLERANCE)


def test_every_batch_of_every_step_draws_anew_and_the_same_again():
    def drawn():
        state, step = opened()
        numbers = []
        for count in (1, 1, 3):
            state, metrics = step(state, FROZEN, batches(count))
            numbers.append(float(metrics["drawn"]))
        return numbers

    first = drawn()
    assert first == drawn()
    assert len(set(first)) == 3
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, step), 0) for step in (0, 1)]
    assert first[:2] == [float(jax.random.uniform(key)) for key in keys]
    last = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, 2), batch)) for batch in range(3)]
    assert first[2] == pytest.approx(float(sum(last)) / 3, rel=1e-6)


def test_the_average_is_kept_only_if_asked_for():
    (batch,) = batches(1)
    state, step = opened(OptimOptions(ema_decay=0.0))
    assert state.ema == {}
    assert state.best is state.weights
    state, _ = step(state, FROZEN, [batch])
    assert state.ema == {}
    state, step = opened()
    before = weights()
    state, _ = step(state, FROZEN, [batch])
    assert state.best is state.ema
    # The first average keeps a tenth of the start.
    assert_same(state.ema, {name: 0.1 * before[name] + 0.9 * state.weights[name] for name in before})


def has_moments(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_all_that_belongs_to_a_weight_lies_as_it_does():
    mesh = make_mesh(MESH)
    specs = {
        "net.blocks.mlp_in.kernel": P(None, "fsdp", "tensor"),
        "net.out.kernel": P("tensor", "fsdp"),
        "net.out.bias": P(),
    }
    state = abstract_start(weights(), OPTIONS, 10, mesh)
    moments = next(each for each in jax.tree.leaves(state.optimizer, is_leaf=has_moments) if has_moments(each))
    for tree in (state.weights, state.ema, moments.mu, moments.nu):
        assert tree.keys() == specs.keys()
        for name, leaf in tree.items():
            assert leaf.dtype == jnp.float32
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim), name
    assert state.step.sharding.is_fully_replicated
    assert moments.count.sharding.is_fully_replicated


def test_a_step_leaves_everything_where_it_was():
    state, step = opened(mesh=MESH)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    for count in (1, 3):
        state, _ = step(state, FROZEN, batches(count))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == before


def test_the_state_before_a_step_is_given_away():
    """It is donated: two states of a large model would not fit."""
    state, step = opened()
    step(state, FROZEN, batches(1))
    assert all(leaf.is_deleted() for leaf in state.weights.values())
