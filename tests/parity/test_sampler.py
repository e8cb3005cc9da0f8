"""Parity of the sampler's pure functions: every table of the manifest and every tensor, none left unread.

Whole numbers, masks, packing and texts are exact, other tables within TABLE_TOLERANCE. The reference's channels-first
layout is known here only. The defaults of its option class are read only where a function of ours has that option.
"""

import inspect
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.models.layers import timestep_embedding
from osjax.models.rope import after_text, rope_table
from osjax.naming import output_stem
from osjax.sampling import condition, geometry, guidance, schedule
from osjax.text import annotate
from tests.parity import cases

DEFAULT_MULTIPLE = 16  # of rows that do not name AE_SPATIAL_COMPRESSION

HEADER = {"case", "set", "dtype", "kind", "runs", "inputs", "outputs", "note", "notes"}
TABLES = {
    "get_image_size": {"rows"},
    "get_schedule": {"rows"},
    "get_oscillation_gs": {"rows", "rows_force_num_3"},
    "sanitize_sampling_option": {"rows", "defaults"},
    "modify_option_to_t2i": {"rows"},
    "latent_frames": {"rows"},
    "text": {"rows"},
    "get_save_path_name": {"rows"},
    "scale_temporal_osci": {"rows"},
}
# The options that mark a run's sort, and the outputs that the sort has.
RUN_OUTPUTS = {
    "unpack_args": {"packed", "unpacked"},
    "cond_type": {"masks", "masked_ref"},
    "txt_len": {"img", "img_ids", "txt_ids"},
}
EMBEDDINGS = {"t": "emb", "guidance": "guidance_emb"}

every_case = pytest.mark.parametrize("case", cases.of_kind("sampler"), ids=cases.case_id)


def runs_with(option: str) -> pytest.MarkDecorator:
    found = [(case, run) for case, run in cases.runs_of_kind("sampler") if option in case.manifest["runs"][run]]
    return pytest.mark.parametrize(("case", "run"), found, ids=cases.case_id)


def only(mapping: dict, *known: str) -> dict:
    """The mapping, after a check that it holds nothing but the known keys: new data must not pass unread."""
    assert mapping.keys() <= set(known), f"unknown keys {sorted(mapping.keys() - set(known))}: add them to a test"
    return mapping


def rows(case: cases.Case, name: str, *columns: str, part: str = "rows") -> list[dict]:
    """The rows of a table as dicts; rows given as lists are zipped with the columns."""
    found = [
        row if isinstance(row, dict) else dict(zip(columns, row, strict=True)) for row in case.manifest[name][part]
    ]
    assert found, f"{name}.{part} is empty"
    return [only(row, *columns) for row in found]


def channels_last(x: np.ndarray) -> np.ndarray:
    """[(B,) C, T, h, w] → [(B,) T, h, w, C]."""
    return np.moveaxis(x, -4, -1)


@every_case
def test_nothing_is_left_unread(case):
    only(case.manifest, *HEADER, *TABLES)
    for name, parts in TABLES.items():
        only(case.manifest[name], "note", *parts)
    outputs = {f"timestep_embedding.{output}" for output in EMBEDDINGS.values()}
    for run, options in case.manifest["runs"].items():
        sorts = RUN_OUTPUTS.keys() & options.keys()
        assert len(sorts) == 1, f"run {run} is of no sort, or of two, that is known here: {sorted(options)}"
        outputs |= {f"{run}.{output}" for output in RUN_OUTPUTS[sorts.pop()]}
    assert case.outputs.keys() == outputs


# -------------------------------------------------------------------------------------------------- tables


@every_case
def test_image_sizes(case):
    for row in rows(case, "get_image_size", "AE_SPATIAL_COMPRESSION", "training", "resolution", "size_hw"):
        for ratio, size in row["size_hw"].items():
            arguments = (row["resolution"], ratio, row["AE_SPATIAL_COMPRESSION"], row["training"])
            if size is None:
                with pytest.raises(OsjaxError, match="no aspect ratio"):
                    geometry.image_size(*arguments)
            else:
                assert geometry.image_size(*arguments) == tuple(size), arguments


@every_case
def test_requested_sizes(case):
    columns = ("option", "height", "width", "method", "AE_SPATIAL_COMPRESSION")
    for row in rows(case, "sanitize_sampling_option", *columns):
        option = only(row["option"], "height", "width", "resolution", "aspect_ratio", "method")
        if "resolution" in option:
            multiple = row.get("AE_SPATIAL_COMPRESSION", DEFAULT_MULTIPLE)
            size = geometry.image_size(option["resolution"], option["aspect_ratio"], multiple)
        else:
            size = option["height"], option["width"]
        assert geometry.round_up_size(*size) == (row["height"], row["width"]), row


@every_case
def test_schedule_defaults(case):
    defaults = case.manifest["sanitize_sampling_option"]["defaults"]
    for name, parameter in inspect.signature(schedule.timesteps).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default == defaults[name], name


@every_case
def test_text_to_image_sizes(case):
    columns = ("resolution", "aspect_ratio", "img_resolution", "height", "width", "num_frames", "guidance", "method")
    after = ("resized_resolution", "resolution_field_after", "num_steps", "resize_target_hw")
    for row in rows(case, "modify_option_to_t2i", *columns, *after):
        ratio = row["aspect_ratio"]
        drawn = geometry.image_size(row["img_resolution"], ratio, training=True)
        target = geometry.image_size(row["resized_resolution"], ratio, training=True)
        assert drawn == (row["height"], row["width"]), row
        assert target == tuple(row["resize_target_hw"]), row


@every_case
def test_latent_frames(case):
    columns = ("num_frames", "temporal_reduction", "is_causal_vae", "latent_frames")
    for row in rows(case, "latent_frames", *columns):
        frames, ratio, causal = (row[name] for name in columns[:3])
        assert geometry.latent_frames(frames, ratio, causal) == row["latent_frames"], row


@every_case
def test_schedules(case):
    columns = ("tag", "num_steps", "image_seq_len", "num_frames", "shift", "shift_alpha", "timesteps")
    for row in rows(case, "get_schedule", *columns):
        levels = schedule.timesteps(
            row["num_steps"],
            row["image_seq_len"],
            row["num_frames"],
            shift=row["shift"],
            flow_shift=row["shift_alpha"],
        )
        cases.assert_close(levels, np.array(row["timesteps"], np.float32), cases.TABLE_TOLERANCE, row["tag"])


@every_case
@pytest.mark.parametrize(("part", "force"), [("rows", {}), ("rows_force_num_3", {"force": 3})])
def test_oscillation(case, part, force):
    for row in rows(case, "get_oscillation_gs", "scale", "step", "result", part=part):
        assert guidance.oscillating(row["scale"], row["step"], **force) == row["result"], row


@every_case
def test_image_scale_per_frame(case):
    for row in rows(case, "scale_temporal_osci", "guidance_img", "i", "num_steps", "latent_frames", "per_frame"):
        arguments = (row["guidance_img"], row["i"], row["num_steps"], row["latent_frames"])
        scale_t = guidance.image_scale_per_frame(*arguments)
        cases.assert_close(scale_t, np.array(row["per_frame"], np.float32), cases.TABLE_TOLERANCE, str(arguments))


@every_case
def test_texts(case):
    columns = ("text", "fps", "motion_score", "with_period", "fps_already", "with_fps", "with_fps_and_motion")
    for row in rows(case, "text", *columns):
        text, fps, score = row["text"], row["fps"], row["motion_score"]
        assert annotate.with_period(text) == row["with_period"]
        assert annotate.with_fps(text, fps) == row["with_fps"]
        assert (row["with_period"] == annotate.with_fps(text, fps)) == row["fps_already"]
        assert annotate.with_motion_score(row["with_fps"], score) == row["with_fps_and_motion"]
        assert annotate.annotate(text, fps, score) == row["with_fps_and_motion"]


@every_case
def test_output_names(case):
    renamed = {"fallback_name": "fallback", "num_sample_pos": "sample", "save_prefix": "prefix"}
    for row in rows(case, "get_save_path_name", "args", "path"):
        arguments = dict(only(row["args"], "name", "index", "prompt", "prompt_as_path", *renamed))
        if not arguments.pop("prompt_as_path", False):
            arguments.pop("prompt", None)  # the reference takes the prompt in any case, and uses it in this one
        stem = output_stem(**{renamed.get(name, name): value for name, value in arguments.items()})
        assert stem == pathlib.PurePosixPath(row["path"]).name


# -------------------------------------------------------------------------------------------------- tensors


@runs_with("unpack_args")
def test_pack(case, run):
    options = only(case.manifest["runs"][run], "patch_size", "unpack_args", "note")
    size = only(options["unpack_args"], "height", "width", "num_frames", "AE_SPATIAL_COMPRESSION")
    outputs = case.run(run, "outputs")
    z_bthwc = channels_last(case.run(run, "inputs")["x"])
    grid = geometry.latent_grid(
        size["height"],
        size["width"],
        size["num_frames"],  # counts latent frames here
        multiple=size["AE_SPATIAL_COMPRESSION"],
        patch=options["patch_size"],
        ratio=1,
    )
    assert grid.noise_shape(z_bthwc.shape[-1], len(z_bthwc)) == z_bthwc.shape
    np.testing.assert_array_equal(geometry.pack(z_bthwc, grid.patch), outputs["packed"])
    np.testing.assert_array_equal(geometry.unpack(outputs["packed"], grid), channels_last(outputs["unpacked"]))


def latents_of(case: cases.Case, run: str) -> np.ndarray:
    """The run's `z`, or that of the nearest group it belongs to (names are nested with dots)."""
    parts = run.split(".")
    names = [".".join([*parts[:depth], "z"]) for depth in range(len(parts), 0, -1)]
    return channels_last(next(case.inputs[name] for name in names if name in case.inputs))


@runs_with("cond_type")
def test_conditions(case, run):
    options = only(case.manifest["runs"][run], "cond_type", "causal", "refs_per_item", "note")
    kind = condition.condition_kind(options["cond_type"])
    inputs, outputs = case.run(run, "inputs"), case.run(run, "outputs")
    z_bthwc = latents_of(case, run)
    references = [
        [channels_last(inputs[name]) for name in sorted(inputs) if name.startswith(f"ref.{item}.")]
        for item in range(len(z_bthwc))
    ]
    counts = [len(sample) for sample in references]
    assert counts == options.get("refs_per_item", counts)
    mask, masked_ref = condition.condition(z_bthwc.shape, references, kind, options["causal"])
    np.testing.assert_array_equal(mask, channels_last(outputs["masks"]))
    np.testing.assert_array_equal(masked_ref, channels_last(outputs["masked_ref"]))


@runs_with("txt_len")
def test_tokens_and_positions(case, run):
    options = only(case.manifest["runs"][run], "patch_size", "txt_len", "note")
    outputs = case.run(run, "outputs")
    z_bthwc = latents_of(case, run)
    grid = geometry.LatentGrid(*z_bthwc.shape[1:4], options["patch_size"])
    x_bnc = np.asarray(geometry.pack(z_bthwc, grid.patch))
    copies = len(outputs["img"]) // len(x_bnc)  # the reference repeats the latents for each branch
    np.testing.assert_array_equal(np.tile(x_bnc, (copies, 1, 1)), outputs["img"])
    ids_n3 = geometry.image_ids(grid)
    np.testing.assert_array_equal(np.broadcast_to(ids_n3, outputs["img_ids"].shape), outputs["img_ids"])

    # Ours never builds ids for text: `after_text` gives its tokens no rotation, which must be what its ids say.
    axes_dim, theta = (2, 4, 6), 10_000.0
    joint_ids = np.concatenate([outputs["txt_ids"], outputs["img_ids"]], axis=1)
    expected = rope_table(joint_ids, axes_dim, theta)
    actual = after_text(rope_table(ids_n3[None], axes_dim, theta), options["txt_len"])
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(ours, theirs.shape), theirs)


@every_case
@pytest.mark.parametrize(("name", "output"), EMBEDDINGS.items())
def test_timestep_embedding(case, name, output):
    """Within one float32 step of the angle t·1000, which is what the last bit of a frequency moves it by."""
    t_b = case.inputs[f"timestep_embedding.{name}"]
    reference = case.outputs[f"timestep_embedding.{output}"]
    embedding = np.asarray(timestep_embedding(jnp.asarray(t_b), reference.shape[1]))
    bound_b1 = np.spacing(np.float32(1000) * t_b)[:, None] + np.finfo(np.float32).eps
    assert embedding.shape == reference.shape
    assert np.all(np.abs(embedding - reference) <= bound_b1)
