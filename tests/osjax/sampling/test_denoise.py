"""The denoising loop: every mesh equals one device, one compiled step, the caller's arrays survive, NaN stops it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.errors import OsjaxError
from osjax.kernels.attention_ref import reference_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rope import rope_table
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.sampling import denoise as loop
from osjax.sampling.guidance import GuidedStep

CONFIG = MMDiTConfig(
    in_channels=8,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=24,
    num_heads=3,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(2, 2, 4),
)
FRAMES, TOKENS, TEXT = 3, 21, 5  # neither divides any mesh axis; three heads do not either


def problem(batch: int, config: MMDiTConfig = CONFIG):
    rng = np.random.default_rng(batch)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    cond = draw(3, batch, TOKENS, config.cond_channels) if config.cond_embed else None
    branches = loop.Branches(draw(3, batch, TEXT, 10), draw(3, batch, 6), cond)
    rope = rope_table(rng.integers(0, 9, (1, TOKENS, 3)), config.axes_dim, config.theta)
    levels = np.array([1.0, 0.8, 0.5, 0.0], np.float32)
    plan = [GuidedStep(used, draw(len(used), FRAMES)) for used in [(0, 1, 2), (0, 2), (0,)]]
    return draw(batch, TOKENS, config.in_channels), branches, rope, plan, levels


def where(**shape):
    return loop.Where(make_mesh(MeshShape(**shape)), reference_attention)


@pytest.fixture(scope="module")
def model():
    return MMDiT(CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def on_one_device(model):
    return {batch: loop.denoise(model, *problem(batch), where())[0] for batch in (1, 3)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [{"seq": 2}, {"seq": 8}, {"data": 2, "seq": 4}, {"data": 8}, {"data": 4, "seq": 2}])
def test_every_mesh_equals_one_device(model, on_one_device, batch, shape):
    """Tolerance 1e-5 of the largest value: the bound promised for float32."""
    expected = np.asarray(on_one_device[batch])
    actual, _ = loop.denoise(model, *problem(batch), where(**shape))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_equals_the_loop_written_out(model, on_one_device):
    x, branches, rope, plan, levels = problem(1)
    for step, level, after in zip(plan, levels, levels[1:], strict=False):
        velocity = sum(
            np.repeat(weight, TOKENS // FRAMES)[None, :, None]
            * model(x, branches.txt_kblc[k], branches.vec_kbp[k], jnp.full((1,), level), rope, reference_attention,
                    branches.cond_kbnc[k])
            for k, weight in zip(step.branches, step.weights_kt, strict=True)
        )  # fmt: skip
        x = x + (after - level) * velocity
    np.testing.assert_allclose(on_one_device[1], x, atol=2e-5 * np.abs(x).max())


def test_one_compiled_step_for_any_number_of_branches(model):
    """Counted by JAX's own monitoring: after the first step nothing is compiled, though the branches change."""
    compiled, after_step = [], []

    def listen(event: str, duration: float, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.clear_caches()
    x, branches, rope, plan, levels = problem(1)
    loop.denoise(model, x, branches, rope, plan, levels, where(), on_step=lambda *_: after_step.append(len(compiled)))
    assert len({len(step.branches) for step in plan}) == len(plan) == len(after_step)
    assert after_step[0] > 0
    assert after_step[-1] - after_step[0] == 0


def test_progress_and_the_callers_noise_survives(model):
    x, branches, rope, plan, levels = problem(1)
    x = jnp.asarray(x)
    before = np.array(x)
    seen = []
    loop.denoise(
        model, x, branches, rope, plan, levels, where(), on_step=lambda done, state: seen.append((done, state.shape))
    )
    assert seen == [(i + 1, x.shape) for i in range(len(plan))]
    np.testing.assert_array_equal(x, before)


def test_guidance_distilled_model():
    config = MMDiTConfig(**{**CONFIG.__dict__, "cond_embed": False, "guidance_embed": True})
    model = MMDiT(config, rngs=nnx.Rngs(1))
    x, branches, rope, plan, levels = problem(2, config)
    guidance = np.full((2,), 4.0, np.float32)
    one, passes = loop.denoise(model, x, branches, rope, plan, levels, where(), guidance_b=guidance)
    many, as_many = loop.denoise(model, x, branches, rope, plan, levels, where(data=2, seq=4), guidance_b=guidance)
    assert passes == as_many == sum(len(step.branches) for step in plan)
    np.testing.assert_allclose(many, one, atol=1e-5 * np.abs(one).max())
    other, _ = loop.denoise(model, x, branches, rope, plan, levels, where(), guidance_b=guidance + 1)
    assert np.abs(np.asarray(other) - np.asarray(one)).max() > 1e-4


def test_not_finite_names_the_step(model):
    x, branches, rope, plan, levels = problem(1)
    plan[1] = GuidedStep(plan[1].branches, np.full_like(plan[1].weights_kt, np.nan))
    with pytest.raises(OsjaxError, match="after step 2 of 3"):
        loop.denoise(model, x, branches, rope, plan, levels, where())


def test_parameters_without_memory():
    full = nnx.eval_shape(lambda: MMDiT(MMDiTConfig(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(full)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == 11_891_390_528
