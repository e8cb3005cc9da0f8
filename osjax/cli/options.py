"""The options of `osjax generate`: a configuration, then `--key value` pairs that change it.

A key is a field of `configs/base.py`; values take the field's type.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base
from osjax.cli.overrides import Field, Fields, flatten, new_parser, parser_of, run_file
from osjax.cli.parser import Parser
from osjax.errors import OsjaxError

HELP = {
    "what to make": {
        "prompt": "what the video shows",
        "negative_prompt": "what it should not show, in place of the empty prompt",
        "dataset.data_path": "CSV file with a column `text`, and if wanted `ref` (two are parted by ;), `name`, "
        "and options of a video",
        "ref": "path of the reference image or clip; two are parted by ;",
        "cond_type": "what the reference is: i2v_head, i2v_tail, i2v_loop, v2v_head, v2v_tail, v2v_head_easy, "
        "v2v_tail_easy; t2v for none",
        "motion_score": "how much moves: a number, from 1 for little to 7 for much; dynamic asks the language model",
        "use_t2i2v": "let FLUX draw the first frame; it stays in generated_condition/ beside the videos",
        "img_resolution": "its size, of the video's ratio, before it is scaled down for the video",
        "img_guidance": "its scale for the text, which FLUX is told",
        "refine_prompt": "let a language model write the prompt out first; it is shown --ref too",
        "seed": "of the noise; sample k of a prompt uses seed + k",
        "fps_save": "frames per second, of the file and in the prompt",
        "sample_posterior": "encode references by a sample, as upstream does, and not by the mode",
    },
    "its size": {
        "sampling_option.resolution": "256px or 768px",
        "sampling_option.aspect_ratio": "width:height, such as 16:9, 1:1, 9:16, 4:3, 2.39:1",
        "sampling_option.height": "in pixels, with width, in place of resolution and aspect_ratio; rounded up to 16",
        "sampling_option.width": "in pixels, with height",
        "sampling_option.num_frames": "4k+1 frames, at most 129 (4k for high_compression); 1 draws an image",
        "sampling_option.extend": "how often the video is then continued from its last 33 frames (32 for "
        "high_compression)",
    },
    "the sampler": {
        "sampling_option.num_steps": "Euler steps",
        "sampling_option.guidance": "scale for the text",
        "sampling_option.guidance_img": "scale for the reference",
        "sampling_option.text_osci": "guide by the text at every other step only, from step 10 on",
        "sampling_option.image_osci": "the same for the reference",
        "sampling_option.scale_temporal_osci": "i2v: guide less by the image early in the clip and late in sampling",
        "sampling_option.shift": "shift the schedule by the size of the video",
        "sampling_option.flow_shift": "shift it by this factor instead",
        "sampling_option.speed": "exact; or APPROXIMATE, reusing what blocks added: balanced (close to exact), fast",
        "sampling_option.seed": "in place of seed",
    },
    "the language model": {
        "refine.model": "its name on the server that OPENAI_BASE_URL and OPENAI_API_KEY open; for --ref one that sees",
        "refine.strict": "stop where it gives no answer of use, and not draw with what the user gave",
        "refine.timeout_s": "seconds that its server may be silent",
        "refine.retries": "how often it is asked again where it refuses for the moment, at growing intervals",
        "refine.at_once": "prompts sent at the same time",
    },
    "which of it, and where to": {
        "save_dir": "folder of the outputs",
        "num_sample": "videos of each prompt",
        "start_index": "first row of the CSV to make, from 0",
        "end_index": "row to stop before",
        "batch_size": "videos made at once",
        "dry_run": "tell what it takes and whether it fits on the devices; load nothing and make nothing",
    },
    "with what": {
        "ckpt_path": "bundle made by `osjax convert`; the embedded tiny one if left out",
        "lora": "LoRAs to draw with: PATH:WEIGHT, such as style:0.8 (weight 1 if left out); several are parted by ;",
        "dtype": "bf16, fp16 or fp32",
        "precision": "full; or APPROXIMATE, 8 bits for the projections in the transformer's blocks: fp8 computes in "
        "them (Ada and Hopper GPUs), int8 stores them; that of the bundle's weights if left out",
        "mesh": "devices, such as data=2,seq=4: data shards prompts, seq the tokens of each",
        "attention": "xla, cudnn or pallas (Hopper GPUs); auto takes the fastest that the device has; or APPROXIMATE, "
        "fp8 (Hopper GPUs), which multiplies in 8 bits",
        "offload": "keep only the model at work on the device",
        "offload_blocks": "with offload: of the transformer keep only the blocks at work; where it would not fit as a "
        "whole if left out",
    },
}

# The size is told in one of two ways; the command line's way replaces the configuration's.
_BY_NAME = frozenset({"sampling_option.resolution", "sampling_option.aspect_ratio"})
_BY_PIXELS = frozenset({"sampling_option.height", "sampling_option.width"})
_WHOLE = "refine."  # the section whose names say too little alone

# What each row of a CSV may say for itself, with all of its section `sampling_option`; the rest is said once.
_OF_A_VIDEO = frozenset(
    {"negative_prompt", "cond_type", "motion_score", "refine_prompt", "seed", "fps_save", "sample_posterior"}
)


@dataclasses.dataclass(frozen=True)
class Options:
    """A command line, read.

    config: every option with its value; given: the keys that the command line named; repeat: the file of `--from`.
    """

    config: ConfigDict
    given: frozenset[str]
    repeat: str | None


def read(argv: Sequence[str]) -> Options:
    """Read `[CONFIG] --key value …`; of a key given twice the last value counts.

    Without CONFIG it is `256px` for a bundle of the user's and `tiny` for the embedded one.
    Raises OsjaxError with one line for an unknown configuration or key, a missing value, or one of the wrong type.
    """
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    fields = _fields(load_config(name) if name else base.get_config())
    given = fields.read(_parser(fields), rest)
    repeat = given.pop("from", None)
    config = load_config(name or ("256px" if given.get("ckpt_path") else "tiny"))
    _change(config, given)
    return Options(config, frozenset(given), repeat)


class Columns:
    """The options as columns of a CSV. spellings, refused: as `osjax.batch.read_csv` takes them."""

    def __init__(self) -> None:
        self._fields = _fields(base.get_config())
        names = self._fields.spellings()
        self.spellings = {name: key for name, key in names.items() if _is_of_a_video(key)}
        self.refused = {name: _why_refused(key) for name, key in names.items() if name not in self.spellings}
        del self.refused["ref"]  # which is a column of its own

    def configure(self, config: ConfigDict, words: Mapping[str, str]) -> ConfigDict:
        """What a configuration is for a row with these words by key; of seeds the row's own comes first.

        Raises OsjaxError for a value of the wrong type, or a size that is given twice.
        """
        given = {key: self._fields.parse(key, word) for key, word in words.items()}
        if "seed" in given:
            given.setdefault("sampling_option.seed", None)
        config = copy.deepcopy(config)
        _change(config, given)
        return config


def _is_of_a_video(key: str) -> bool:
    return key.startswith("sampling_option.") or key in _OF_A_VIDEO


def _why_refused(key: str) -> str:
    if key == "prompt":
        return "the prompts of a CSV stand in its column 'text': leave this one out"
    return f"this is an option of the whole command: leave it out, and give --{key}"


def _change(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Puts values by full key into a configuration; a size told in one way takes the place of one told in the other."""
    for ours, other in ((_BY_NAME, _BY_PIXELS), (_BY_PIXELS, _BY_NAME)):
        if ours & given.keys():
            if other & given.keys():
                raise OsjaxError("the size is given twice: give resolution and aspect_ratio, or height and width")
            config.update_from_flattened_dict(dict.fromkeys(other))
    config.update_from_flattened_dict(dict(given))


def load_config(name: str) -> ConfigDict:
    """The configuration of that name in `configs/`, or the `.py` file at that path, completed from `configs/base.py`.

    Raises OsjaxError for a file that is missing, does not run, or sets an unknown key or a value of the wrong type.
    """
    path, options = run_file(name, Path(base.__file__).parent)
    config = base.get_config()
    known = flatten(config.to_dict())
    for key, value in flatten(options).items():
        if key not in known:
            raise OsjaxError(f"{path} sets an unknown key {key}: did you mean {_fields(config).nearest(key)}?")
        if value is None and known[key] is not None:
            raise OsjaxError(f"{path} sets {key} to None: give it a value")
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError as error:
            wanted = type_of(key).__name__
            raise OsjaxError(f"{path} sets {key} to {value!r}: give a value of type {wanted}") from error
    return config


def type_of(key: str) -> type:
    """The type of a field's values, be it None by default or not."""
    section, _, name = key.rpartition(".")
    config = base.get_config()
    return (config[section] if section else config).get_type(name)


def markdown() -> str:
    """The options as tables, for docs/cli.md."""
    return _fields(base.get_config()).markdown(HELP)


def _parser(fields: Fields) -> Parser:
    parser = new_parser(
        "generate",
        "osjax generate [CONFIG] [--key value ...]",
        "Make videos. CONFIG is a name (256px, 768px, tiny) or the path of a .py file.",
        "--sampling_option.num-steps",
    )
    parser.add_argument("--from", metavar="FILE", help="repeat the video in FILE, by the provenance it carries")
    fields.add_to(parser, HELP)
    return parser


def _fields(config: ConfigDict) -> Fields:
    optional = {key for key, default in flatten(base.get_config().to_dict()).items() if default is None}
    fields = {}
    for key, value in flatten(config.to_dict()).items():
        kind = type_of(key)
        fields[key] = Field(parser_of(kind, key in optional), kind.__name__, value, whole=key.startswith(_WHOLE))
    return Fields(fields)


if __name__ == "__main__":
    print(markdown())
