"""The options of `osjax train`: a configuration, then `--key value` pairs that change it.

A key is a field of `osjax/training/options.py`, whose type hints say what it takes. Entries of a mapping are keys too:
`--flow.conditions.v2v_head 2`, `--new.mmdit.depth 4`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.train import base
from osjax.cli.overrides import Field, Fields, flatten, new_parser, parser_of, run_file
from osjax.cli.parser import Parser
from osjax.cli.sections import below, build, describe, fit, hint_of, hints, word_parser
from osjax.errors import OsjaxError
from osjax.training.options import TrainConfig

HELP = {
    "what is trained": {
        "stage": "flow (the video model), text (its encoders, on captions of shapes) or vae (the autoencoder)",
        "ckpt_path": "bundle to start from",
        "new.COMPONENT.OPTION": "an option of a component that starts from random numbers, such as new.mmdit.depth",
        "trained": "components whose weights change; the others stay as they are",
        "settings.OPTION": "an option of generation that the bundle is to ask for, such as settings.num_frames",
        "lora.rank": "train adapters of this rank in place of the weights; 0 for the weights themselves",
        "lora.alpha": "adapters are scaled by alpha / rank",
        "lora.targets": "projections that get an adapter, by the last names of their modules",
    },
    "on what": {
        "data.path": "CSV or parquet file of clips, made by --prepare; the procedural shapes if left out",
        "data.resolution": "sizes of the clips, such as 256px",
        "data.aspect_ratios": "their width:height; each size comes in each of them",
        "data.num_frames": "their lengths, 4k+1",
        "data.fps": "frames per second they are brought to",
        "data.cache": "folder that keeps latents and text embeddings for the next epoch",
        "data.clips": "how many shapes clips there are; 0 for a new one every time",
        "data.two_things": "share of the shapes clips with two things",
        "data.workers": "clips that are read at the same time",
    },
    "for how long, and how": {
        "run.steps": "optimizer steps",
        "run.batch_size": "clips a batch, over all devices",
        "run.seed": "of everything that is drawn",
        "run.mesh": "devices, such as data=2,fsdp=4: data shards clips, fsdp the weights too",
        "run.dtype": "of the computation, bf16, fp16 or fp32; the weights are in float32",
        "run.attention": "xla, cudnn or pallas; auto takes the fastest that has a backward pass",
        "run.remat": "computed again in the backward pass, to save memory: blocks, products, elementwise or nothing",
    },
    "the optimizer": {
        "optim.lr": "learning rate of AdamW",
        "optim.betas": "decay of its two moments",
        "optim.eps": "of its denominator",
        "optim.weight_decay": "decoupled from the gradient",
        "optim.clip_norm": "largest norm of the gradient",
        "optim.warmup_steps": "steps in which the learning rate rises from 0",
        "optim.schedule": "constant, or cosine down to the last step",
        "optim.final_lr_share": "what cosine comes down to, as a share of lr",
        "optim.accumulate": "batches whose gradients make one step",
        "optim.ema_decay": "of the averaged weights that are exported; 0 for none",
    },
    "the losses": {
        "flow.t5_dropout": "chance that T5 is given the empty prompt",
        "flow.clip_dropout": "chance that CLIP is, by itself",
        "flow.conditions.KIND": "weight that a kind of condition is drawn with, such as flow.conditions.v2v_head",
        "flow.loss_on_given": "whether frames that a reference gives count",
        "flow.flow_shift": "shift of the noise levels towards noise, in place of what the video's size asks for",
        "vae.l1_weight": "of the mean absolute error of the pixels",
        "vae.l2_weight": "of their mean squared error",
        "vae.kl_weight": "of the divergence from a standard normal",
        "vae.given_share": "of the clips whose first latent frame, and whose last, is a frame encoded alone",
    },
    "what it leaves behind": {
        "run.log_every": "steps between lines on stdout",
        "run.save_every": "steps between checkpoints",
        "run.keep": "how many of them stay",
        "run.sample_every": "steps between sample videos; 0 for none",
        "run.sample_prompts": "what they show, parted by ;",
    },
}

# The user names the entries of a mapping: in the help these names stand for them.
_ENTRIES = {"new": "COMPONENT.OPTION", "settings": "OPTION", "flow.conditions": "KIND"}
_RESUME = ("auto", "never")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to start, or to go on with unless it has to start `anew`, in `folder`; force: go on with other options."""

    config: TrainConfig
    folder: Path
    anew: bool
    force: bool


@dataclasses.dataclass(frozen=True)
class Prepare:
    """A table to make of the clips in a folder."""

    table: Path
    folder: Path


def read(argv: Sequence[str]) -> Run | Prepare:
    """Read `CONFIG --key value …`, or `--prepare TABLE FOLDER`.

    Raises OsjaxError with one line for an unknown configuration or key, a missing value, or one of the wrong type.
    """
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    config = load_config(name) if name else TrainConfig()
    fields = _fields(config, rest)
    given = fields.read(_parser(fields), rest)
    if "prepare" in given:
        if name or len(given) > 1:
            raise OsjaxError("--prepare makes a table and trains nothing: leave out the configuration and its options")
        return Prepare(*map(Path, given["prepare"]))
    if name is None:
        raise OsjaxError("nothing to train: name a configuration, or the path of a .py file, before the options")
    folder = Path(given.pop("out", None) or Path("runs") / Path(name).stem)
    anew, force = given.pop("resume", "auto") == "never", given.pop("force", False)
    return Run(build(TrainConfig, _flat(config) | given), folder, anew, force)


def load_config(name: str) -> TrainConfig:
    """The configuration of that name in `configs/train/`, or the `.py` file at that path; it may leave out any option.

    Raises OsjaxError for a file that is missing, does not run, or sets an unknown key or a value of the wrong type.
    """
    path, options = run_file(name, Path(base.__file__).parent)
    values = {}
    for key, value in flatten(options).items():
        hint = hint_of(TrainConfig, key)
        if hint is None:
            nearest = _fields(TrainConfig()).nearest(key)
            raise OsjaxError(f"{path} sets an unknown key {key}: did you mean {nearest}?")
        try:
            values[key] = fit(value, hint)
        except TypeError as error:
            raise OsjaxError(f"{path} sets {key} to {value!r}: give a value of type {describe(hint)}") from error
    return build(TrainConfig, values)


def markdown() -> str:
    """The options as tables, for docs/cli.md."""
    return _fields(TrainConfig()).markdown(HELP)


def _parser(fields: Fields) -> Parser:
    parser = new_parser(
        "train",
        "osjax train CONFIG [--key value ...]\n       osjax train --prepare TABLE FOLDER",
        "Train a model. CONFIG is a name in configs/train/ or the path of a .py file.",
        "--optim.warmup-steps",
    )
    parser.add_argument("--out", metavar="FOLDER", help="of the run's outputs [runs/CONFIG]")
    parser.add_argument("--resume", choices=_RESUME, help="auto: go on from the newest checkpoint, if any [auto]")
    parser.add_argument("--force", metavar="BOOL", type=parser_of(bool), help="go on though the options differ [False]")
    parser.add_argument("--prepare", nargs=2, metavar=("TABLE", "FOLDER"), help="make a table of the clips in a folder")
    fields.add_to(parser, HELP)
    return parser


def _fields(config: TrainConfig, argv: Sequence[str] = ()) -> Fields:
    """The keys with the values of `config`; of the entries of mappings those that `config` or `argv` name."""
    values = _flat(config)
    shown = {f"{mapping}.{names}": below(values, f"{mapping}.") for mapping, names in _ENTRIES.items()}
    named = {token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")}
    defaults = dict.fromkeys(sorted(named)) | shown | values
    plain = hints(TrainConfig)
    fields = {}
    for key, default in defaults.items():
        if hint := hint_of(TrainConfig, key):
            fields[key] = Field(word_parser(hint), describe(hint), default, whole=key not in plain)
    return Fields(fields)


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Every option by its full key, mappings entry by entry."""
    return flatten(dataclasses.asdict(config))


if __name__ == "__main__":
    print(markdown())
