"""What a Hopper GPU (compute capability 9.0) has, as far as kernels must know."""

from __future__ import annotations

import jax

SHARED_BYTES = 227 * 1024  # shared memory that one block may use
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # per thread; 3 · 128 threads share 65 536
H100_MULTIPROCESSORS = 132


def multiprocessors() -> int:
    """Of the device, each for a block of a persistent kernel; of an H100 where there is no GPU, as when lowering on a
    CPU."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else H100_MULTIPROCESSORS
