"""AdamW with clipping, warm-up and decay, from optax; and the moving average of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from osjax.training.options import OptimOptions


def learning_rate(options: OptimOptions, total_steps: int) -> optax.Schedule:
    """Optimizer step (from 0) → learning rate."""
    if options.schedule == "cosine":
        rest = optax.cosine_decay_schedule(
            options.lr, max(1, total_steps - options.warmup_steps), alpha=options.final_lr_share
        )
    else:
        rest = optax.constant_schedule(options.lr)
    if not options.warmup_steps:
        return rest
    # The first step already moves: a warm-up of n steps takes 1/n, 2/n, … of the rate.
    share = 1 / options.warmup_steps
    warm_up = optax.linear_schedule(share * options.lr, options.lr, options.warmup_steps - 1)
    return optax.join_schedules([warm_up, rest], [options.warmup_steps])


def optimizer(options: OptimOptions, total_steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with decoupled weight decay on every weight, as PyTorch's."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            learning_rate(options, total_steps),
            b1=options.betas[0],
            b2=options.betas[1],
            eps=options.eps,
            weight_decay=options.weight_decay,
        ),
    )


def moving_average(
    average: dict[str, jax.Array], weights: dict[str, jax.Array], step: jax.Array, decay: float
) -> dict[str, jax.Array]:
    """The average after optimizer step `step` (from 0); early on it forgets faster, so that the start does not linger.

    An empty average stays empty.
    """
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return {name: value + rate * (weights[name] - value) for name, value in average.items()}
