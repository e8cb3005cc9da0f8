"""Reference image in, uint8 frames out, every stage against the reference. Kind `end_to_end`."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import hunyuan_vae as vae_table
from convert.rules import convert_module
from osjax.kernels.attention_ref import reference_attention
from osjax.media import read_reference, to_uint8
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.sampling import schedule
from osjax.sampling.condition import condition_kind
from osjax.sampling.geometry import latent_grid
from osjax.sampling.guidance import Guidance
from osjax.sampling.latents import SamplingOptions, Text, sample_latents
from osjax.sampling.step import Where
from tests.parity import cases
from tests.parity.test_mmdit import build as build_mmdit

KNOWN_RUN = frozenset(
    {
        "model",
        "ae",
        "cond_type",
        "patch_size",
        "D",
        "spatial_tiling",
        "temporal_tiling",
        "text",
        "seed",
        "opt",
        "ref_files",
    }
)
KNOWN_OPTIONS = frozenset(
    {"height", "width", "num_frames", "num_steps", "guidance", "guidance_img", "text_osci", "image_osci"}
    | {"scale_temporal_osci", "temporal_reduction", "is_causal_vae", "shift", "flow_shift", "method"}
)


def runnable() -> list[cases.Case]:
    """Cases whose autoencoder is of a kind that is covered; the others wait for that kind."""
    found = cases.of_kind("end_to_end")
    return [case for case in found if case.weights_case(case.manifest["run"]["ae"]).kind in cases.COVERED]


def channels_last(x_bcthw: np.ndarray) -> np.ndarray:
    return np.moveaxis(x_bcthw, 1, -1)


@pytest.mark.parametrize("case", runnable(), ids=cases.case_id)
def test_every_stage(case):
    run, given, expected = case.manifest["run"], case.inputs, case.outputs
    opt = run["opt"]
    assert set(run) <= KNOWN_RUN
    assert set(opt) <= KNOWN_OPTIONS
    mmdit = build_mmdit(case.weights_case(run["model"]))
    source = case.weights_case(run["ae"])
    vae = convert_module(vae_table, source.config, source.weights, jnp.float32)
    vae = vae.with_tiling(spatial=run["spatial_tiling"], temporal=run["temporal_tiling"])
    noise = channels_last(given["noise"])
    grid = latent_grid(
        opt["height"],
        opt["width"],
        opt["num_frames"],
        multiple=run["D"],
        patch=run["patch_size"],
        ratio=opt["temporal_reduction"],
        causal=opt["is_causal_vae"],
    )
    assert noise.shape == grid.noise_shape(noise.shape[-1])

    references = []
    kind = condition_kind(run["cond_type"])
    length = kind.reference_frames(opt["is_causal_vae"], opt["temporal_reduction"])
    for index, (file, from_end) in enumerate(kind.assign(run.get("ref_files", []))):
        pixels = read_reference(case.folder / file, length, opt["height"], opt["width"], from_end=from_end)[None]
        cases.assert_close(pixels, channels_last(expected[f"ref_pixels_{index}"]), what=f"pixels {index}")
        latent = vae.encode(pixels)
        cases.assert_close(latent, channels_last(expected[f"ref_latent_{index}"]), what=f"latent {index}")
        references.append(latent[0])

    scales = Guidance(
        opt["guidance"], opt["guidance_img"], opt["text_osci"], opt["image_osci"], opt["scale_temporal_osci"]
    )
    options = SamplingOptions(opt["num_steps"], scales, opt["shift"], opt.get("flow_shift"))
    levels = schedule.timesteps(
        options.steps, grid.tokens_per_frame, grid.t, shift=options.shift, flow_shift=options.flow_shift
    )
    np.testing.assert_allclose(levels, case.manifest["timesteps"], rtol=0, atol=cases.TABLE_TOLERANCE)
    states = {}
    z_bthwc, _ = sample_latents(
        mmdit,
        noise,
        Text(given["txt"], given["y_vec"]),
        Text(given["txt_neg"], given["y_vec_neg"]),
        [references],
        kind,
        options,
        Where(make_mesh(MeshShape()), reference_attention),
        on_step=lambda done, x_bnc: states.update({f"state_{done:02d}": np.array(x_bnc)}),
    )
    for name in (name for name in expected if name.startswith("state_")):
        cases.assert_close(states[name], expected[name], cases.TRAJECTORY_TOLERANCE, name)
    latents = channels_last(expected["latent_before_decode"])
    cases.assert_close(z_bthwc, latents, cases.TRAJECTORY_TOLERANCE, "latents")

    decoded = vae.decode(z_bthwc)
    assert decoded.shape[1] == expected["decoded_frames"]
    video = decoded[:, : opt["num_frames"]]
    cases.assert_close(video, channels_last(expected["video"]), cases.TRAJECTORY_TOLERANCE, "video")
    frames = np.asarray(to_uint8(video[0])).astype(int)
    assert np.mean(np.abs(frames - expected["frames_uint8"]) <= 1) >= 0.999
