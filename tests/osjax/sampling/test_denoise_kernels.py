"""The sampler's step with kernels for Hopper GPUs, lowered for CUDA on any machine."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from osjax.kernels.flash_sm90 import flash_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.operations import BY_KERNELS
from osjax.models.quantized import quantize
from osjax.models.rngs import ModuleRngs
from osjax.models.rope import Rope
from osjax.models.streamed import cut
from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.parallel.ulysses import JointSequence
from osjax.sampling import streaming
from osjax.sampling.step import Branches, Where, euler_step

CONFIG = MMDiTConfig(
    vec_in_dim=32, context_in_dim=48, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3, mlp_ratio=3.0
)
BATCH, TOKENS, TEXT, BRANCHES = 2, 64, 32, 3


@pytest.mark.parametrize("precision", ["full", "fp8"])
@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=2"])
def test_the_step_lowers_with_kernels(mesh: str, precision: str) -> None:
    half, wide = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    model = nnx.eval_shape(lambda: quantize(MMDiT(CONFIG, rngs=ModuleRngs(0), dtype=jnp.bfloat16), precision))
    devices = make_mesh(parse_mesh(mesh))
    sequence = JointSequence(TEXT, TOKENS, devices.shape["seq"])
    text, vector = half((BRANCHES, BATCH, TEXT, CONFIG.context_in_dim)), half((BRANCHES, BATCH, CONFIG.vec_in_dim))
    angles = wide((1, TOKENS, CONFIG.head_dim // 2))
    traced = euler_step.trace(
        model,
        wide((BATCH, TOKENS, CONFIG.in_channels)),
        Branches(text, vector, half((BRANCHES, BATCH, TOKENS, CONFIG.cond_channels))),
        Rope(angles, angles),
        wide((BRANCHES, TOKENS)),
        whole((BRANCHES,)),
        whole(()),
        wide(()),
        wide(()),
        None,
        sequence=sequence,
        where=Where(devices, flash_attention, BY_KERNELS),
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Attention and each block's products: 3 of a single block, 4 of each stream of a double one.
    assert text.count("mosaic_gpu_v2") >= 2 + 3 + 8


@pytest.mark.parametrize("precision", ["full", "fp8"])
@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=2"])
def test_single_blocks_lower_with_kernels(mesh: str, precision: str) -> None:
    """As they are on GPUs, each by itself and not in a stack."""
    half, wide = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    model = nnx.eval_shape(lambda: cut(quantize(MMDiT(CONFIG, rngs=ModuleRngs(0), dtype=jnp.bfloat16), precision)))
    devices = make_mesh(parse_mesh(mesh))
    sequence = JointSequence(TEXT, TOKENS, devices.shape["seq"])
    means = {"sequence": sequence, "where": Where(devices, flash_attention, BY_KERNELS)}
    image, text, joint = (half((BATCH, count, CONFIG.hidden_size)) for count in (TOKENS, TEXT, TOKENS + TEXT))
    vector = half((BATCH, CONFIG.hidden_size))

    def rope(count: int) -> Rope:
        return Rope(*[wide((1, count, CONFIG.head_dim // 2))] * 2)

    through_double, through_single = (
        jax.jit(functools.partial(through, **means)) for through in (streaming.through_double, streaming.through_single)
    )
    double = through_double.trace(model.double[0], image, text, vector, rope(TOKENS))
    single = through_single.trace(model.single[0], joint, vector, rope(TOKENS + TEXT))
    for traced, kernels in ((double, 1 + 8), (single, 1 + 3)):
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") >= kernels
