"""Whole sampling loops against the reference: states on the way and final latents. Kind `denoise`."""

import jax.numpy as jnp
import numpy as np
import pytest

from osjax.kernels.attention_ref import reference_attention
from osjax.models.rope import rope_table
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.sampling import guidance
from osjax.sampling.condition import condition_kind
from osjax.sampling.denoise import denoise
from osjax.sampling.geometry import pack
from osjax.sampling.latents import SamplingOptions, Text, sample_latents
from osjax.sampling.step import Branches, Where
from tests.parity import cases
from tests.parity.test_mmdit import build

KNOWN_OPTIONS = frozenset(
    {"denoiser", "model", "num_steps", "T", "h", "w", "cond_type", "B", "guidance", "guidance_img"}
    | {"text_osci", "image_osci", "scale_temporal_osci"}
)


def channels_last(z_bcthw: np.ndarray) -> np.ndarray:
    return np.moveaxis(z_bcthw, 1, -1)


def thirds(stacked: np.ndarray, batch: int) -> np.ndarray:
    """[3B, …] in the order prompt, negative, negative → [3, B, …], our branches."""
    return stacked.reshape(3, batch, *stacked.shape[1:])


def guided(run: dict, given: dict, patch: int) -> tuple[Branches, tuple[guidance.GuidedStep, ...], None]:
    batch = run["B"]
    pixels = np.concatenate([given["masks"], given["masked_ref"]], axis=1)
    cond = pack(channels_last(pixels), patch)
    branches = Branches(
        thirds(given["txt"], batch), thirds(given["y_vec"], batch), np.stack([cond, cond, np.zeros_like(cond)])
    )
    plan = guidance.plan(
        guidance.Guidance(
            run["guidance"], run["guidance_img"], run["text_osci"], run["image_osci"], run["scale_temporal_osci"]
        ),
        run["num_steps"],
        run["T"],
        image_condition=condition_kind(run["cond_type"]).is_image,
        same_text=np.array_equal(*thirds(given["txt"], batch)[:2]),
        same_condition=not cond.any(),
    )
    return branches, plan, None


def distilled(run: dict, given: dict) -> tuple[Branches, tuple[guidance.GuidedStep, ...], np.ndarray]:
    branches = Branches(given["txt"][None], given["y_vec"][None])
    plan = (guidance.GuidedStep((0,), np.ones((1, run["T"]), np.float32)),) * run["num_steps"]
    return branches, plan, np.full((run["B"],), run["guidance"], np.float32)


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=2, seq=4)], ids=str)
@pytest.mark.parametrize(("case", "name"), cases.runs_of_kind("denoise"), ids=cases.case_id)
def test_trajectory(case, name, mesh):
    run, given, expected = case.manifest["runs"][name], case.run(name, "inputs"), case.run(name, "outputs")
    assert set(run) <= KNOWN_OPTIONS
    source = case.weights_case(run["model"])
    model = build(source)
    patch = source.config.get("patch_size", 2)
    x = pack(channels_last(given["z"]), patch)
    np.testing.assert_array_equal(x, given["img"][: run["B"]])
    branches, plan, scale = guided(run, given, patch) if run["denoiser"] == "i2v" else distilled(run, given)
    rope = rope_table(given["img_ids"][:1], model.config.axes_dim, model.config.theta)
    states = {}

    def keep(done, x_bnc):
        states[done] = np.array(x_bnc)

    where = Where(make_mesh(mesh), reference_attention)
    final, _ = denoise(model, jnp.asarray(x), branches, rope, plan, given["timesteps"], where, scale, on_step=keep)
    for key, reference in expected.items():
        actual = final if key == "final" else states[int(key.removeprefix("state_"))]
        cases.assert_close(actual, reference, cases.TRAJECTORY_TOLERANCE, f"{name}.{key}")


DISTILLED = [
    (case, name) for case, name in cases.runs_of_kind("denoise") if case.manifest["runs"][name]["denoiser"] == "distill"
]


@pytest.mark.parametrize(("case", "name"), DISTILLED, ids=cases.case_id)
def test_a_model_that_is_told_its_guidance(case, name):
    """From noise and text alone: the schedule, the scale and the one pass a step are the sampler's own."""
    run, given, expected = case.manifest["runs"][name], case.run(name, "inputs"), case.run(name, "outputs")
    model = build(case.weights_case(run["model"]))
    text = Text(jnp.asarray(given["txt"]), jnp.asarray(given["y_vec"]))
    empty = Text(jnp.zeros_like(text.states_blc), jnp.zeros_like(text.pooled_bp))
    options = SamplingOptions(run["num_steps"], guidance.Guidance(text=run["guidance"]))
    noise, none = jnp.asarray(channels_last(given["z"])), [[]] * run["B"]
    where = Where(make_mesh(MeshShape()), reference_attention)
    z_bthwc, passes = sample_latents(model, noise, text, empty, none, condition_kind("t2v"), options, where)
    assert passes == run["num_steps"]
    final = pack(z_bthwc, model.config.patch_size)
    cases.assert_close(final, expected["final"], cases.TRAJECTORY_TOLERANCE, name)
