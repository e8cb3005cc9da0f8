"""`osjax convert` and `osjax generate --lora`, from peft's files to videos, with the embedded bundle."""

import pytest

from osjax import leaves, provenance
from osjax.bundle import read_bundle
from osjax.cli import generate, main, options
from osjax.errors import OsjaxError
from osjax.pipeline import EMBEDDED, Pipeline
from osjax.residency import model_config
from tests import peft_folder

SMALL = ["--prompt", "a", "--num_frames", "1", "--num_steps", "1", "--height", "16", "--width", "16", "--dtype", "fp32"]


def peft(folder, seed=0, times=1):
    """A LoRA of peft for the embedded bundle, or for one that is some times as wide; strong enough to show."""
    config = model_config(read_bundle(EMBEDDED).component("mmdit"))
    width, heads = times * config.hidden_size, times * config.num_heads
    options = {**vars(config), "fused_qkv": False, "use_liger_rope": True, "hidden_size": width, "num_heads": heads}
    shapes = {
        "double_blocks.0.img_attn.q_proj": (width, width),
        "single_blocks.0.v_mlp": (width + int(width * options["mlp_ratio"]), width),
    }
    tensors = peft_folder.random_tensors(shapes, dict.fromkeys(shapes, 2), seed)
    return peft_folder.write(folder, tensors, {"r": 2, "lora_alpha": 2}, options)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder that holds the LoRAs `style` and `red:2`, their sources, and one of another model."""
    folder = tmp_path_factory.mktemp("loras")
    for name, seed, times in (("style", 0, 1), ("red:2", 1, 1), ("wide", 2, 2)):
        assert main.main(["convert", str(peft(folder / "peft" / name, seed, times)), str(folder / name)]) == 0
    return folder


def make(tmp_path, *words):
    return main.main(["generate", "--save_dir", str(tmp_path / "out"), *SMALL, *map(str, words)])


def made(tmp_path):
    return provenance.read(tmp_path / "out" / "image_16x16" / "prompt_0000.png")


def test_from_peft_to_a_picture_and_back(loras, tmp_path, capsys):
    frames = {}
    for lora in (None, "style", "style:0.5;red:2", "red:2:-1; style"):
        words = ["--lora", ";".join(f"{loras}/{each.strip()}" for each in lora.split(";"))] if lora else []
        assert make(tmp_path, *words) == 0
        assert "kept" not in capsys.readouterr().err, "another LoRA is another picture"
        frames[lora] = made(tmp_path).frames_sha256
    assert len(set(frames.values())) == len(frames)
    told = made(tmp_path).loras
    assert [(each.name, each.weight) for each in told] == [("red:2", -1.0), ("style", 1.0)]
    assert all(len(each.sha256) == 64 for each in told)

    assert make(tmp_path, *words) == 0
    assert "1 of 1 are made already: kept" in capsys.readouterr().err
    assert make(tmp_path) == 0
    assert made(tmp_path).frames_sha256 == frames[None]
    assert made(tmp_path).loras == ()


def test_from_repeats_with_the_same_loras_only(loras, tmp_path, capsys):
    assert make(tmp_path, "--lora", f"{loras}/style:0.5") == 0
    words = ["generate", "--from", str(tmp_path / "out" / "image_16x16" / "prompt_0000.png")]
    words += ["--save_dir", str(tmp_path / "out")]
    assert main.main([*words, "--lora", f"{loras}/style:0.5"]) == 0
    assert "same frames, bit for bit" in capsys.readouterr().err
    for wrong in ([], ["--lora", f"{loras}/style:0.6"], ["--lora", f"{loras}/red:2:0.5"]):
        assert main.main([*words, *wrong]) == 2
        assert "made with the LoRAs style:0.5: name them with --lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("missing:0.8", "no LoRA at .*missing"),
        ("style:heavy", r"no LoRA at .*style:heavy: check the path \(a weight is written PATH:0\.8\)"),
        ("style:nan", "the weight of LoRA .*style is nan: give a finite number"),
        ("style:inf", "is inf: give a finite number"),
        ("peft/style", "osjax convert .*peft/style FOLDER"),
        ("peft/style/adapter_model.safetensors", "osjax convert"),
        ("wide", r"another model \(hidden_size \d+, not \d+; num_heads \d+, not \d+\)"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_made(loras, tmp_path, capsys, lora, message):
    assert make(tmp_path, "--lora", f"{loras}/{lora}") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    with pytest.raises(OsjaxError, match=message):
        raise OsjaxError(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", 1.0)]),
        ("a:0.8", [("a", 0.8)]),
        ("a:0.8;b ; c:-2;", [("a", 0.8), ("b", 1.0), ("c", -2.0)]),
        ("C:/styles/a:0.8", [("C:/styles/a", 0.8)]),
        ("C:/styles/a", [("C:/styles/a", 1.0)]),
        ("a:1e-1", [("a", 0.1)]),
        ("", []),
        (" ; ", []),
        (":0.8", [(":0.8", 1.0)]),
    ],
)
def test_paths_and_weights(text, expected):
    assert list(generate.parse_lora(text)) == expected
    assert generate.plan(options.read(["--prompt", "a", f"--lora={text}"]).config).model.lora == tuple(expected)


def test_a_path_that_ends_like_a_weight(tmp_path):
    (tmp_path / "a:2").mkdir()
    assert generate.parse_lora(f"{tmp_path}/a:2") == ((f"{tmp_path}/a:2", 1.0),)
    assert generate.parse_lora(f"{tmp_path}/a:2:0.5") == ((f"{tmp_path}/a:2", 0.5),)


@pytest.mark.parametrize(("dtype", "mesh"), [("fp32", "data=1"), ("bf16", "data=2,seq=4")])
def test_without_loras_the_weights_are_the_bundles_to_the_bit(loras, dtype, mesh):
    pipeline = Pipeline.load(dtype=dtype, mesh=mesh, progress=False)

    def weights():
        with pipeline.residency.on_device("mmdit") as mmdit:
            return leaves.flatten(mmdit)

    before = weights()
    pipeline.use_lora([(loras / "style", 1.0), (loras / "red:2", 0.3)])
    during = weights()
    changed = {name for name in before if (before[name] != during[name]).any()}
    kernels = {"double_blocks.img.qkv.lin.kernel", "single_blocks.qkv.lin.kernel", "single_blocks.mlp_in.kernel"}
    assert changed == kernels
    assert all(during[name].dtype == array.dtype for name, array in before.items())
    assert all(during[name].sharding == array.sharding for name, array in before.items())
    pipeline.use_lora()
    after = weights()
    assert all((before[name] == after[name]).all() for name in before)
    assert pipeline.loras == ()
