"""Runs kernels for Hopper GPUs on one, or in Pallas' interpreter of GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest


def hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == "9.0"


@contextlib.contextmanager
def interpreted(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs kernels in Pallas' interpreter of GPUs, made to do what the GPU does in two places.

    It gives every view of a RefUnion its own memory, where the kernel reads through one what came in through another;
    and it wants every last arrival at a barrier to be waited for, where nobody is left to wait.
    """
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret")
    if not hasattr(interpreter, "allocate_ref_union"):
        pytest.skip("this jax cannot interpret RefUnion")
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params, shared_memory

    def share(token: jax.Array, keys: np.ndarray, **_: object) -> jax.Array:
        memory = gpu_callbacks._get_shared_memory().mem
        buffers = [memory[gpu_callbacks.HostAllocationKey.from_array(key)] for key in keys]
        for one, other in zip(buffers[: len(buffers) // 2], buffers[len(buffers) // 2 :], strict=True):
            if other._content.dtype == one._content.dtype:  # else the views take turns, and share nothing
                other._content = one._content.reshape(other._content.shape)
        return token

    def deallocate(self: shared_memory.Barrier) -> None:
        with self.cv:
            self.ref_count -= 1
            assert self.ref_count or not self.arrivals_count

    patch.setattr(gpu_callbacks, "_tag_ref_union", share)
    patch.setattr(shared_memory.Barrier, "deallocate", deallocate)
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        yield
