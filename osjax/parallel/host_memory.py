"""Weights that wait in the host's memory: page-locked, which devices read and write directly and at several times the
pace, without the host's help.

Every host keeps one copy, however many devices have one.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from osjax.errors import is_out_of_memory

Tree = TypeVar("Tree")


def to_host(tree: Tree) -> Tree:
    """A copy in this host's memory of arrays that every device has whole; when it returns, they may be deleted.

    Page-locked as far as the process may lock so much, else in ordinary memory. NumPy's arrays, which are in the host's
    memory already, are copied too.
    """
    try:
        return jax.block_until_ready(jax.tree.map(_page_locked, tree))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return jax.tree.map(lambda array: np.array(_here(array)), tree)


def to_devices(tree: Tree, sharding: Sharding) -> Tree:
    """The copy, whole on every device of the sharding. It crosses the bus once; devices give it to each other."""
    first, *others = sorted(sharding.addressable_devices, key=lambda device: device.id)
    copies = [jax.device_put(tree, SingleDeviceSharding(first))]
    copies += [jax.device_put(copies[0], SingleDeviceSharding(other)) for other in others]

    def one(*each: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(each[0].shape, sharding, list(each))

    return jax.tree.map(one, *copies)


def _page_locked(array: jax.Array | np.ndarray) -> jax.Array:
    here = _here(array)
    device = here.device if isinstance(here, jax.Array) else jax.local_devices()[0]
    return jax.device_put(here, SingleDeviceSharding(device, memory_kind="pinned_host"))


def _here(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The array as the first of this host's devices has it."""
    return array.addressable_shards[0].data if isinstance(array, jax.Array) else array
