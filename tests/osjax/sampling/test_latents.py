"""The sampler as a whole: the passes it saves change nothing, and references come back in every sample."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.kernels.attention_ref import reference_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.sampling import guidance
from osjax.sampling.condition import condition_kind
from osjax.sampling.latents import SamplingOptions, Text, sample_latents
from osjax.sampling.step import Where

CONFIG = MMDiTConfig(
    in_channels=8,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=16,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
)
SHAPE = (2, 3, 4, 4, 2)  # b t h w c: patch 2 makes 8 channels a token


@pytest.fixture(scope="module")
def model():
    return MMDiT(CONFIG, rngs=nnx.Rngs(5))


def text(seed: int) -> Text:
    rng = np.random.default_rng(seed)
    return Text(
        jnp.asarray(rng.normal(size=(2, 4, 10)), jnp.float32), jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    )


def sample(model, cond_type: str, options: SamplingOptions, negative: Text | None = None):
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    kind = condition_kind(cond_type)
    references = [
        [jnp.asarray(rng.normal(size=(1, *SHAPE[2:])), jnp.float32) for _ in range(kind.references)] for _ in range(2)
    ]
    where = Where(make_mesh(MeshShape()), reference_attention)
    z, passes = sample_latents(
        model, noise, text(1), text(2) if negative is None else negative, references, kind, options, where
    )
    return np.asarray(z), passes, references


def all_three_branches(levels_3t, *, same_text, same_condition):
    """The plain formula: every branch computed at every step, whatever its weight."""
    return guidance.GuidedStep((0, 1, 2), np.diff(levels_3t, axis=0, prepend=0.0).astype(np.float32))


@pytest.mark.parametrize(("cond_type", "passes"), [("t2v", 80), ("i2v_head", 110), ("i2v_loop", 110)])
def test_default_passes_and_the_same_result_as_all_branches(model, monkeypatch, cond_type, passes):
    """80 and 110 of 150. Tolerance 1e-4 of the largest value: fifty float32 steps whose sums differ in order."""
    saved, counted, _ = sample(model, cond_type, SamplingOptions())
    assert counted == passes
    monkeypatch.setattr(guidance, "guided_step", all_three_branches)
    full, counted, _ = sample(model, cond_type, SamplingOptions())
    assert counted == 150
    np.testing.assert_allclose(saved, full, rtol=0, atol=1e-4 * np.abs(full).max())


def test_a_negative_prompt_equal_to_the_prompt_needs_no_text_branch(model):
    _, passes, _ = sample(model, "t2v", SamplingOptions(steps=6), negative=text(1))
    assert passes == 6


@pytest.mark.parametrize("cond_type", ["i2v_head", "i2v_tail", "i2v_loop"])
def test_references_are_back_in_every_sample(model, cond_type):
    z, _, references = sample(model, cond_type, SamplingOptions(steps=2))
    for drawn, given in zip(z, references, strict=True):
        if cond_type != "i2v_tail":
            np.testing.assert_array_equal(drawn[0], given[0][0])
        if cond_type != "i2v_head":
            np.testing.assert_array_equal(drawn[-1], given[-1][0])


def test_the_condition_reaches_the_model(model):
    conditioned, _, _ = sample(model, "i2v_head", SamplingOptions(steps=4))
    free, _, _ = sample(model, "t2v", SamplingOptions(steps=4))
    assert np.abs(conditioned[:, 1:] - free[:, 1:]).max() > 1e-3
