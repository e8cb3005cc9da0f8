"""The command line's options: every key in every spelling, typed values, one-line errors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from osjax.cli import options
from osjax.errors import OsjaxError

# The spellings of upstream's runbook, with values that differ from the defaults.
RUNBOOK = {
    "--save-dir": ("save_dir", "out", "out"),
    "--prompt": ("prompt", "raining, sea", "raining, sea"),
    "--negative-prompt": ("negative_prompt", "blur", "blur"),
    "--dataset.data-path": ("dataset.data_path", "rows.csv", "rows.csv"),
    "--ref": ("ref", "a.png;b.png", "a.png;b.png"),
    "--cond_type": ("cond_type", "i2v_loop", "i2v_loop"),
    "--aspect_ratio": ("sampling_option.aspect_ratio", "9:16", "9:16"),
    "--num_frames": ("sampling_option.num_frames", "17", 17),
    "--extend": ("sampling_option.extend", "2", 2),
    "--num_steps": ("sampling_option.num_steps", "5", 5),
    "--resolution": ("sampling_option.resolution", "768px", "768px"),
    "--sampling_option.resolution": ("sampling_option.resolution", "768px", "768px"),
    "--guidance": ("sampling_option.guidance", "4", 4.0),
    "--guidance_img": ("sampling_option.guidance_img", "1.5", 1.5),
    "--text-osci": ("sampling_option.text_osci", "False", False),
    "--image-osci": ("sampling_option.image_osci", "0", False),
    "--scale-temporal-osci": ("sampling_option.scale_temporal_osci", "false", False),
    "--shift": ("sampling_option.shift", "False", False),
    "--flow_shift": ("sampling_option.flow_shift", "3", 3.0),
    "--speed": ("sampling_option.speed", "fast", "fast"),
    "--motion-score": ("motion_score", "dynamic", "dynamic"),
    "--refine-prompt": ("refine_prompt", "True", True),
    "--refine.model": ("refine.model", "mine", "mine"),
    "--refine.strict": ("refine.strict", "True", True),
    "--refine.timeout-s": ("refine.timeout_s", "5", 5.0),
    "--refine.retries": ("refine.retries", "0", 0),
    "--refine.at_once": ("refine.at_once", "8", 8),
    "--num-sample": ("num_sample", "3", 3),
    "--seed": ("seed", "7", 7),
    "--sampling_option.seed": ("sampling_option.seed", "7", 7),
    "--offload": ("offload", "True", True),
    "--offload_blocks": ("offload_blocks", "True", True),
    "--dtype": ("dtype", "fp16", "fp16"),
    "--precision": ("precision", "int8", "int8"),
    "--batch_size": ("batch_size", "2", 2),
    "--dry-run": ("dry_run", "True", True),
    "--use_t2i2v": ("use_t2i2v", "True", True),
    "--img-resolution": ("img_resolution", "512px", "512px"),
    "--img_guidance": ("img_guidance", "3.5", 3.5),
    "--start_index": ("start_index", "1", 1),
    "--end_index": ("end_index", "4", 4),
    "--fps_save": ("fps_save", "16", 16),
    "--ckpt_path": ("ckpt_path", "bundle", "bundle"),
    "--lora": ("lora", "style:0.8;other", "style:0.8;other"),
    "--mesh": ("mesh", "data=2,seq=4", "data=2,seq=4"),
    "--attention": ("attention", "reference", "reference"),
    "--sample-posterior": ("sample_posterior", "1", True),
}

KEYS = sorted(key for group in options.HELP.values() for key in group)


def value(config, key):
    """The field that a dotted key names."""
    for name in key.split("."):
        config = config[name]
    return config


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("spelling", RUNBOOK)
@pytest.mark.parametrize("joined", [False, True])
def test_spellings_of_the_runbook(spelling, joined):
    key, word, expected = RUNBOOK[spelling]
    read = options.read(["256px", f"{spelling}={word}"] if joined else ["256px", spelling, word])
    found = value(read.config, key)
    assert (found, type(found)) == (expected, type(expected))
    assert read.given == {key}


def test_every_key_has_its_help_and_its_place_in_the_runbook():
    config = base.get_config()
    sections = ("dataset", "sampling_option", "refine")
    fields = {name for name in config if name not in sections}
    fields |= {f"{section}.{name}" for section in sections for name in config[section]}
    assert set(KEYS) == fields
    assert fields - {key for key, *_ in RUNBOOK.values()} == {"sampling_option.height", "sampling_option.width"}


@pytest.mark.parametrize("key", KEYS)
def test_dashes_dots_and_none(key):
    dashed = "--" + key.replace("_", "-")
    if value(base.get_config(), key) is None:
        assert value(options.read(["256px", dashed, "None"]).config, key) is None
    elif options.type_of(key) is not str:
        with pytest.raises(OsjaxError, match="'None' is"):
            options.read(["256px", dashed, "None"])


@given(number=st.integers(-(10**18), 10**18))
def test_integers(number):
    assert options.read([f"--seed={number}"]).config.seed == number


@given(number=st.floats())
def test_floats_must_be_finite(number):
    if math.isfinite(number):
        assert options.read([f"--guidance={number}"]).config.sampling_option.guidance == number
    else:
        with pytest.raises(OsjaxError, match="finite"):
            options.read([f"--guidance={number}"])


@given(text=st.text())
def test_any_text_is_a_prompt(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(OsjaxError, match="UTF-8"):
            options.read([f"--prompt={text}"])
        return
    assert options.read([f"--prompt={text}"]).config.prompt == (None if text == "None" else text)


def test_help_shows_the_configuration(capsys, tmp_path):
    path = config_file(tmp_path, "return ConfigDict({'prompt': '100% rain', 'seed': 123})")
    with pytest.raises(SystemExit) as exit_:
        options.read([path, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "[100% rain]" in text
    assert "[123]" in text


@given(words=st.lists(st.text(max_size=8) | st.sampled_from(["--seed", "--prompt", "--", "-", "256px", "3", "--x=1"])))
def test_any_command_line_is_read_or_refused_in_one_line(words):
    message = ""
    try:
        options.read(words)
    except OsjaxError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_frame", "5"], "unknown option --num_frame: did you mean --num_frames?"),
        (["--num-stepz=5"], "unknown option --num_stepz: did you mean --num_steps?"),
        (["--sampling_option.gidance", "5"], "did you mean --sampling_option.guidance?"),
        (["--data.path", "x.csv"], "did you mean --data_path?"),
        (["--prompts", "x"], "did you mean --prompt?"),
        (["--zzzzzzzz", "x"], "did you mean --"),
        (["--num_frames", "many"], "--num_frames: 'many' is not a whole number"),
        (["--num_frames", "17.0"], "'17.0' is not a whole number"),
        (["--guidance", "nan"], "'nan' is not a finite number"),
        (["--offload", "yes"], "'yes' is neither True nor False"),
        (["--prompt"], "--prompt: expected one argument"),
        (["--seed", "--prompt", "a"], "--seed: expected one argument"),
        (["--seed", "1", "256px"], "'256px' follows no key"),
        (["--prompt", "a", "red", "ball"], "'red' follows no key"),
        (
            ["128px"],
            "no configuration '128px': give the path of a .py file, or one of 256px, 768px, high_compression, "
            "t2i2v_256px, t2i2v_768px, tiny",
        ),
        (["missing/file.py"], "no configuration 'missing/file.py'"),
        (["--resolution", "256px", "--height", "64"], "the size is given twice"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(OsjaxError) as error:
        options.read(words)
    assert message in one_line(error)


def test_the_last_of_a_key_counts():
    read = options.read(["--num_steps", "3", "--sampling-option.num-steps", "4"])
    assert read.config.sampling_option.num_steps == 4


def test_the_configuration_follows_the_bundle():
    assert options.read([]).config.sampling_option.resolution == "96px"
    assert options.read(["--ckpt_path", "bundle"]).config.sampling_option.resolution == "256px"
    assert options.read(["768px"]).config.sampling_option.resolution == "768px"


def test_the_command_line_decides_how_the_size_is_told():
    by_pixels = options.read(["256px", "--height", "96", "--width", "64"]).config.sampling_option
    assert (by_pixels.resolution, by_pixels.aspect_ratio, by_pixels.height, by_pixels.width) == (None, None, 96, 64)
    by_name = options.read(["tiny", "--resolution", "256px", "--aspect_ratio", "16:9"]).config.sampling_option
    assert (by_name.resolution, by_name.aspect_ratio, by_name.height, by_name.width) == ("256px", "16:9", None, None)


def test_from_is_no_key():
    read = options.read(["--from", "clip.mp4", "--save_dir", "out"])
    assert (read.repeat, read.given) == ("clip.mp4", {"save_dir"})


def config_file(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    {body}\n")
    return str(path)


def test_a_file_by_its_path(tmp_path):
    path = config_file(tmp_path, "return ConfigDict({'seed': 5, 'sampling_option': {'guidance': 2, 'height': 64}})")
    config = options.read([path, "--num_steps", "3"]).config
    assert (config.seed, config.sampling_option.guidance, config.sampling_option.height) == (5, 2.0, 64)
    assert config.sampling_option.num_frames == base.get_config().sampling_option.num_frames


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return ConfigDict({'sampling_option': {'num_step': 5}})", "did you mean sampling_option.num_steps?"),
        ("return ConfigDict({'seed': 'x'})", "sets seed to 'x': give a value of type int"),
        ("return ConfigDict({'seed': None})", "sets seed to None"),
        ("raise ValueError('no')", "does not run (ValueError: no)"),
        ("return 3", "does not run (AttributeError"),
        ("return (", "does not run (SyntaxError"),
    ],
)
def test_mistakes_in_a_file(tmp_path, body, message):
    with pytest.raises(OsjaxError) as error:
        options.load_config(config_file(tmp_path, body))
    assert message in one_line(error)
