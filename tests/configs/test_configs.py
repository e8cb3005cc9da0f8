"""The named configurations: they load, keep upstream's settings, and say what they are for."""

import ast
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import configs
from osjax.bundle import read_bundle
from osjax.cli import generate, options, train_options
from osjax.pipeline import EMBEDDED

FOLDER = Path(configs.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "base"))


def flat(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_names_to_keep():
    assert {"256px", "768px", "t2i2v_256px", "t2i2v_768px", "high_compression", "tiny"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_path_give_one_valid_request(name):
    config = options.load_config(name)
    assert config.to_dict() == options.load_config(str(FOLDER / f"{name}.py")).to_dict()
    assert set(flat(config)) == {key for group in options.HELP.values() for key in group}
    config.prompt = "x"
    (job,) = generate.plan(config).jobs
    assert job.request.num_frames % 4 == (0 if name == "high_compression" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_states_source_result_and_command(name):
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert "Source: " in docstring
    assert "Expected result: " in docstring
    assert f"osjax generate {name} " in docstring


@pytest.mark.parametrize(
    ("name", "resolution", "frames"),
    [
        ("256px", "256px", 129),
        ("768px", "768px", 129),
        ("t2i2v_256px", "256px", 129),
        ("t2i2v_768px", "768px", 129),
        ("high_compression", "768px", 128),
    ],
)
def test_settings_of_upstream(name, resolution, frames):
    config = options.load_config(name)
    sampling = config.sampling_option
    assert (sampling.resolution, sampling.aspect_ratio, sampling.num_frames) == (resolution, "16:9", frames)
    assert (sampling.num_steps, sampling.guidance, sampling.guidance_img) == (50, 7.5, 3.0)
    assert (sampling.text_osci, sampling.image_osci, sampling.scale_temporal_osci, sampling.shift) == (True,) * 4
    assert (sampling.flow_shift, sampling.seed) == (None, None)
    assert (config.seed, config.fps_save, config.motion_score, config.dtype) == (42, 24, "4", "bf16")


def test_the_command_line_asks_of_the_embedded_model_what_its_bundle_wants():
    """`Pipeline.request` takes the bundle's settings, `osjax generate` those of the file."""
    wanted = dict(read_bundle(EMBEDDED).settings)
    config = options.load_config("tiny")
    assert wanted.pop("fps") == config.fps_save
    assert wanted == {name: config.sampling_option[name] for name in wanted}
    assert wanted["flow_shift"] == train_options.load_config("tiny_flow").flow.flow_shift
