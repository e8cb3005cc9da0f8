"""What changes while training, as one pytree of flat dictionaries, and one optimizer step on it.

Leaves are named `component.leaf` (`mmdit.double_blocks.img.proj.kernel`); weights and moments are float32, whatever the
computation's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from osjax.parallel.weights import weight_spec
from osjax.training.optim import learning_rate, moving_average, optimizer
from osjax.training.options import OptimOptions

Weights = dict[str, jax.Array]
# (trained weights, frozen weights, batch, key) → (loss, what else to report); differentiable in the first.
Loss = Callable[[Weights, Weights, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """step: optimizer steps done; ema: moving average of the weights, {} if none is kept."""

    step: jax.Array
    weights: Weights
    ema: Weights
    optimizer: optax.OptState

    @property
    def best(self) -> Weights:
        """What is exported and sampled from."""
        return self.ema or self.weights


def start(weights: Weights, options: OptimOptions, total_steps: int) -> TrainState:
    """The state before the first step."""
    ema = jax.tree.map(jnp.copy, weights) if options.ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), weights, ema, optimizer(options, total_steps).init(weights))


def abstract_start(weights: Weights, options: OptimOptions, total_steps: int, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state over `mesh`: optimizer moments and averages lie as their weights do."""
    state = jax.eval_shape(functools.partial(start, options=options, total_steps=total_steps), weights)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The last key of the path is the weight's name, wherever in the state it stands.
        spec = weight_spec(getattr(path[-1], "key", ""), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, state)


def make_step(
    loss: Loss, options: OptimOptions, total_steps: int, key: jax.Array, shardings: TrainState
) -> Callable[[TrainState, Weights, Sequence[Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, frozen, batches) → (state, metrics)`: one optimizer step on the mean gradient of the batches.

    The state is donated and comes back on `shardings`. Batch i of step n draws from `key` folded with n and i, so that
    a resumed run draws what it would have drawn. metrics: loss (mean over batches), grad_norm before clipping, lr, and
    what the loss reports, each a scalar. Batches may differ in shape; each shape is compiled once.
    """
    tx, rate = optimizer(options, total_steps), learning_rate(options, total_steps)

    def gradients(state: TrainState, frozen: Weights, batch: Any, index: jax.Array) -> tuple[Weights, dict]:
        one = jax.random.fold_in(jax.random.fold_in(key, state.step), index)
        (value, extra), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights, frozen, batch, one)
        return gradient, {"loss": value, **extra}

    def update(state: TrainState, gradient: Weights, metrics: dict) -> tuple[TrainState, dict]:
        updates, moments = tx.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        ema = moving_average(state.ema, weights, state.step, options.ema_decay)
        norm_and_rate = {"grad_norm": optax.global_norm(gradient), "lr": jnp.asarray(rate(state.step))}
        return TrainState(state.step + 1, weights, ema, moments), metrics | norm_and_rate

    def add(total: Any, state: TrainState, frozen: Weights, batch: Any, index: jax.Array) -> Any:
        return jax.tree.map(jnp.add, total, gradients(state, frozen, batch, index))

    def finish(state: TrainState, total: Any, count: int) -> tuple[TrainState, dict]:
        return update(state, *jax.tree.map(lambda each: each / count, total))

    def at_once(state: TrainState, frozen: Weights, batch: Any) -> tuple[TrainState, dict]:
        return update(state, *gradients(state, frozen, batch, 0))

    jitted_at_once = jax.jit(at_once, donate_argnums=0, out_shardings=(shardings, None))
    jitted_first = jax.jit(gradients, out_shardings=(shardings.weights, None))
    jitted_add = jax.jit(add, donate_argnums=0, out_shardings=(shardings.weights, None))
    jitted_finish = jax.jit(finish, donate_argnums=0, static_argnums=2, out_shardings=(shardings, None))

    def step(state: TrainState, frozen: Weights, batches: Sequence[Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        if len(batches) == 1:  # fused, so that gradients need not all exist at the same time
            return jitted_at_once(state, frozen, batches[0])
        total = jitted_first(state, frozen, batches[0], 0)
        for index, batch in enumerate(batches[1:], start=1):
            total = jitted_add(total, state, frozen, batch, index)
        return jitted_finish(state, total, len(batches))

    return step
