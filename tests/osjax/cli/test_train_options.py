"""`osjax train`'s command line: every option in every spelling, configurations, one-line errors."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.train import base
from osjax.cli import main, train_options
from osjax.cli.sections import hint_of, hints, is_mapping
from osjax.cli.train_options import Prepare
from osjax.errors import OsjaxError
from osjax.training.options import TrainConfig

BASE = base.__file__
KEYS = {key for group in train_options.HELP.values() for key in group}

SPELLINGS = {
    "--steps": ("run.steps", "7", 7),
    "--run.steps": ("run.steps", "7", 7),
    "--run.batch-size": ("run.batch_size", "2", 2),
    "--lr": ("optim.lr", "1e-3", 1e-3),
    "--betas": ("optim.betas", ".9,.95", (0.9, 0.95)),
    "--remat": ("run.remat", "nothing", "nothing"),
    "--path": ("data.path", "clips.csv", "clips.csv"),
    "--ckpt-path": ("ckpt_path", "bundle", "bundle"),
    "--trained": ("trained", "mmdit,vae", ("mmdit", "vae")),
    "--num_frames": ("data.num_frames", "17,33", (17, 33)),
    "--aspect-ratios": ("data.aspect_ratios", "1:1", ("1:1",)),
    "--sample_prompts": ("run.sample_prompts", "a cat, asleep;a dog", ("a cat, asleep", "a dog")),
}


def read(*words):
    return train_options.read([BASE, *words]).config


def value(config, key):
    """The field that a dotted key names."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def config_file(tmp_path, *lines):
    path = tmp_path / "mine.py"
    body = "".join(f"    {line}\n" for line in lines)
    path.write_text(
        "from ml_collections import ConfigDict\n\nfrom configs.train import base\n\n\n"
        f"def get_config():\n    config = base.get_config()\n{body}    return config\n"
    )
    return str(path)


def test_defaults_are_those_of_the_dataclasses():
    assert read() == TrainConfig()


def test_every_option_has_its_help():
    mappings = {key for key, hint in hints(TrainConfig).items() if is_mapping(hint)}
    entries = {key for key in KEYS if key not in hints(TrainConfig)}
    assert KEYS - entries == hints(TrainConfig).keys() - mappings
    assert {key for key in mappings if any(entry.startswith(f"{key}.") for entry in entries)} == mappings
    assert all(hint_of(TrainConfig, key) for key in entries)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("joined", [False, True])
def test_spellings(spelling, joined):
    key, word, expected = SPELLINGS[spelling]
    config = read(f"{spelling}={word}") if joined else read(spelling, word)
    found = value(config, key)
    assert (found, type(found)) == (expected, type(expected))
    assert expected != value(TrainConfig(), key), "this test tests nothing"


@pytest.mark.parametrize("key", sorted(KEYS & hints(TrainConfig).keys()))
def test_every_option_takes_its_own_default(key):
    default = value(TrainConfig(), key)
    word = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert read("--" + key.replace("_", "-"), word) == TrainConfig()


def test_entries_of_mappings():
    config = read("--flow.conditions.v2v-head", "2", "--flow.conditions.t2v=0", "--new.mmdit.depth", "4")
    assert config.flow.conditions == TrainConfig().flow.conditions | {"v2v_head": 2.0, "t2v": 0.0}
    assert config.new == {"mmdit": {"depth": 4}}


def test_a_file_replaces_a_mapping_and_the_command_line_adds_to_it(tmp_path):
    path = config_file(
        tmp_path, "config.flow.conditions = {'t2v': 1}", "config.new.mmdit = {'depth': 2, 'axes_dim': [4, 6, 6]}"
    )
    config = train_options.load_config(path)
    assert config.flow.conditions == {"t2v": 1.0}
    assert config.new == {"mmdit": {"depth": 2, "axes_dim": [4, 6, 6]}}
    config = train_options.read([path, "--flow.conditions.i2v_head", "3", "--new.mmdit.depth", "5"]).config
    assert config.flow.conditions == {"i2v_head": 3.0, "t2v": 1.0}
    assert config.new == {"mmdit": {"depth": 5, "axes_dim": [4, 6, 6]}}


def test_a_file_may_say_only_what_differs(tmp_path):
    path = config_file(tmp_path, "config = ConfigDict({'run': {'steps': 5}, 'data': {'resolution': ['96px']}})")
    config = train_options.load_config(path)
    default = TrainConfig()
    run, data = dataclasses.replace(default.run, steps=5), dataclasses.replace(default.data, resolution=("96px",))
    assert config == dataclasses.replace(default, run=run, data=data)


def test_help_shows_the_configuration(capsys, tmp_path):
    path = config_file(tmp_path, "config.run.steps = 12345", "config.flow.conditions = {'i2v_tail': 7.0}")
    with pytest.raises(SystemExit) as exit_:
        train_options.read([path, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps [12345]" in text
    assert "[i2v_tail 7.0]" in text


def test_where_the_outputs_go_and_how_a_run_starts():
    asked = train_options.read([BASE])
    assert (asked.folder, asked.anew, asked.force) == (Path("runs/base"), False, False)
    asked = train_options.read([BASE, "--out", "there", "--resume", "never", "--force", "True"])
    assert (asked.folder, asked.anew, asked.force) == (Path("there"), True, True)


def test_prepare():
    assert train_options.read(["--prepare", "data.csv", "clips"]) == Prepare(Path("data.csv"), Path("clips"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to train: name a configuration"),
        (["--steps", "3"], "nothing to train: name a configuration"),
        (["missing"], "no configuration 'missing'"),
        ([BASE, "--step", "3"], "unknown option --step: did you mean --steps?"),
        ([BASE, "--optim.learning_rate", "3"], "unknown option --optim.learning_rate: did you mean --"),
        ([BASE, "--flow.condition.t2v", "3"], "did you mean --flow.conditions.t2v?"),
        ([BASE, "--new.mmdit", "3"], "unknown option --new.mmdit"),
        ([BASE, "--steps", "many"], "'many' is not a whole number"),
        ([BASE, "--steps", "0"], "run.steps is 0: give at least 1"),
        ([BASE, "--betas", ".9"], "'.9' has not 2 values"),
        ([BASE, "--flow.conditions.t2v", "often"], "'often' is not a finite number"),
        ([BASE, "--stage", "image"], "unknown stage 'image'"),
        ([BASE, "--resume", "always"], "--resume: invalid choice: 'always'"),
        ([BASE, "--force", "yes"], "'yes' is neither True nor False"),
        ([BASE, "--out"], "--out: expected one argument"),
        ([BASE, "--steps", "3", "4"], "'4' follows no key"),
        ([BASE, "--prepare", "data.csv", "clips"], "--prepare makes a table and trains nothing"),
        (["--prepare", "data.csv", "clips", "--steps", "3"], "--prepare makes a table and trains nothing"),
        (["--prepare", "data.csv"], "--prepare: expected 2 arguments"),
    ],
)
def test_mistakes(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("osjax: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.run.step = 5", "sets an unknown key run.step: did you mean run.steps?"),
        ("config.run.sample_prompts = 'a cat'", "does not run (TypeError"),
        ("config.ckpt_path = 5", "sets ckpt_path to 5: give a value of type str"),
        ("config.optim.betas = (0.9,)", "sets optim.betas to (0.9,): give a value of type float,float"),
        ("config.flow.conditions = {'t2v': 'x'}", "sets flow.conditions.t2v to 'x': give a value of type float"),
        ("config.new.mmdit = {'a': {'b': 1}}", "sets an unknown key new.mmdit.a.b"),
        ("config.stage = 'image'", "unknown stage 'image'"),
        ("raise ValueError('no')", "does not run (ValueError: no)"),
        ("return 3", "does not run (AttributeError"),
    ],
)
def test_mistakes_in_a_file(tmp_path, line, message):
    with pytest.raises(OsjaxError) as error:
        train_options.load_config(config_file(tmp_path, line))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(
    words=st.lists(
        st.text(max_size=8) | st.sampled_from(["--steps", "--new.a.b", "--flow.conditions.x", "--", "3", BASE])
    )
)
def test_any_command_line_is_read_or_refused_in_one_line(words):
    message = ""
    try:
        train_options.read([BASE, *words])
    except OsjaxError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
