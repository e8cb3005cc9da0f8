"""Attention on a training mesh: each device attends in its own clips, with its own heads.

It spares the kernel every question of sharding, and it decides how the whole block is computed. What enters and leaves
attention being cut by clips, so is all between, and each block's weights are gathered over `fsdp` as it runs. Left to
itself the compiler takes the other way where weights are cut over `fsdp`: every device holds the whole batch, cut by
features, and activations are summed over the devices.

B batch, M tokens of the joint sequence, H heads, D head width.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from osjax.kernels.attention import Attention
from osjax.parallel.specs import TRAINING_ROWS


def attend_locally(attend: Attention, mesh: Mesh) -> Attention:
    """`attend` on q, k, v [B, M, H, D] cut along B over `data` and `fsdp`, and along H over `tensor` if it divides H.

    mesh: of a `TrainingMeshShape`; B must divide over it.
    """

    def attention(q_bmhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
        heads = "tensor" if q_bmhd.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = P(*TRAINING_ROWS, None, heads, None)
        return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(q_bmhd, k_bmhd, v_bmhd)

    return attention
