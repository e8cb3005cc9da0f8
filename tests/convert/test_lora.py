"""LoRAs of peft: to convert and then to merge equals to merge and then to convert; what is refused, and how."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import lora as conversion
from convert import mmdit
from convert.__main__ import main
from convert.lora import prepare
from convert.rules import convert_module
from osjax import adapters, leaves
from osjax.errors import OsjaxError
from osjax.models import lora
from tests import peft_folder
from tests.parity import cases

SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "lora_dropout": 0.1}
# One float32 rounding of every product and of the sum, in another order.
ROUNDING = 1e-6


def case(name: str) -> cases.Case:
    return cases.load(name, cases.VENDORED)


def linear_modules(golden: cases.Case) -> dict[str, tuple[int, int]]:
    """Every module of a checkpoint that LoRA can adapt, and the shape (out, in) of its weight."""
    return {name.removesuffix(".weight"): each.shape for name, each in golden.weights.items() if each.ndim == 2}


VIDEO, FLUX = case("mmdit_video"), case("mmdit_flux")
MODULES = {golden.name: linear_modules(golden) for golden in (VIDEO, FLUX)}


def a_pair(module="double_blocks.0.img_attn.proj", golden=VIDEO, rank=4) -> dict[str, np.ndarray]:
    return peft_folder.random_tensors({module: MODULES[golden.name][module]}, {module: rank})


def convert(folder, tensors, config=SETTINGS, golden=VIDEO) -> conversion.Job:
    return prepare(peft_folder.write(folder, tensors, config, golden.config) / "adapter_model.safetensors")


def assert_merges_alike(folder, golden, tensors, config, scales) -> None:
    """Converted and merged, the adapter gives what the checkpoint gives after W + scale · B·A."""
    weights = dict(golden.weights)
    for module, scale in scales.items():
        a, b = (tensors[f"{peft_folder.PREFIX}{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        weights[f"{module}.weight"] = (weights[f"{module}.weight"] + scale * b @ a).astype(np.float32)
    expected = leaves.flatten(convert_module(mmdit, golden.config, weights, jnp.float32))
    plain = convert_module(mmdit, golden.config, golden.weights, jnp.float32)
    actual = leaves.flatten(jax.jit(lora.merge)(plain, convert(folder, tensors, config, golden).lora))
    for name, array in expected.items():
        bound = ROUNDING * max(1.0, np.abs(array).max()) * 8
        assert np.abs(actual[name] - array).max() <= bound, name


@pytest.mark.parametrize("golden", [VIDEO, FLUX], ids=cases.case_id)
def test_every_module_of_the_checkpoint_can_be_adapted(golden, tmp_path):
    modules = MODULES[golden.name]
    tensors = peft_folder.random_tensors(modules, dict.fromkeys(modules, 4))
    assert_merges_alike(tmp_path, golden, tensors, SETTINGS, dict.fromkeys(modules, 2.0))


@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_any_choice_of_modules_and_ranks(data, tmp_path_factory):
    """Layers left out, and ranks that differ between the layers of a stack and between q, k and v."""
    golden = data.draw(st.sampled_from([VIDEO, FLUX]))
    modules = data.draw(st.sets(st.sampled_from(sorted(MODULES[golden.name])), min_size=1, max_size=6))
    ranks = {module: data.draw(st.integers(1, 5)) for module in sorted(modules)}
    config = SETTINGS | {"rank_pattern": {module.replace(".", r"\."): rank for module, rank in ranks.items()}}
    tensors = peft_folder.random_tensors({module: MODULES[golden.name][module] for module in modules}, ranks)
    scales = {module: 8 / rank for module, rank in ranks.items()}
    assert_merges_alike(tmp_path_factory.mktemp("lora"), golden, tensors, config, scales)


def test_patterns_and_rank_stabilised_scales(tmp_path):
    """Patterns match the last names, the first of them wins: as `get_pattern_key` of peft 0.21."""
    ranks = {"single_blocks.0.q_proj": 2, "single_blocks.1.q_proj": 4, "double_blocks.0.img_attn.proj": 4}
    config = SETTINGS | {
        "use_rslora": True,
        "rank_pattern": {r"0\.q_proj": 2, "q_proj": 4, "j": 9},
        "alpha_pattern": {"proj": 3, "img_attn.proj": 5},
    }
    tensors = peft_folder.random_tensors({module: MODULES["mmdit_video"][module] for module in ranks}, ranks)
    scales = {
        "single_blocks.0.q_proj": 8 / math.sqrt(2),
        "single_blocks.1.q_proj": 8 / math.sqrt(4),
        "double_blocks.0.img_attn.proj": 3 / math.sqrt(4),
    }
    assert_merges_alike(tmp_path, VIDEO, tensors, config, scales)


@pytest.mark.parametrize(
    ("spelling", "extra", "scale"),
    [
        ("{module}.lora_{part}.weight", {}, 1.0),
        ("diffusion_model.{module}.lora_{part}.weight", {}, 1.0),
        ("base_model.model.{module}.lora_{part}.default.weight", {}, 1.0),
        ("{module}.lora_{way}.weight", {"{module}.alpha": np.float32(2.0)}, 0.5),
    ],
)
def test_bare_files_in_other_spellings(tmp_path, spelling, extra, scale):
    """Without a config the scale is 1, or the file's own alpha over the rank."""
    module = "double_blocks.0.img_attn.proj"
    a, b = a_pair(module).values()
    tensors = {spelling.format(module=module, part="A", way="down"): a}
    tensors |= {spelling.format(module=module, part="B", way="up"): b}
    tensors |= {name.format(module=module): np.asarray(value) for name, value in extra.items()}
    made = convert(tmp_path, tensors, None).lora
    found_a, found_b = made.factors["double_blocks.img.proj"]
    np.testing.assert_array_equal(found_a[0], a.T)
    np.testing.assert_array_equal(found_b[0], scale * b.T)
    assert not found_a[1:].any()
    assert not found_b[1:].any()


@pytest.mark.parametrize(
    ("module", "rows", "guidance"),
    [
        ("double_blocks.18.img_attn.q_proj", 3072, False),
        ("double_blocks.18.img_attn.qkv", 3 * 3072, True),
        ("single_blocks.37.linear1", 7 * 3072, True),
    ],
)
def test_without_options_it_is_for_a_published_model(tmp_path, module, rows, guidance):
    tensors = peft_folder.random_tensors({module: (rows, 3072)}, {module: 1})
    job = prepare(peft_folder.write(tmp_path, tensors) / "adapter_model.safetensors")
    assert job.base.guidance_embed is guidance
    assert (job.base.hidden_size, job.base.depth, job.options_from) == (3072, 19, "the published model")


def without(name):
    return {key: value for key, value in a_pair().items() if name not in key}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it is empty"),
        (without("lora_B"), r"base_model\.model\.double_blocks\.0\.img_attn\.proj\.lora_A\.weight"),
        (without("lora_A"), r"proj\.lora_B\.weight"),
        (a_pair() | {"proj.lora_magnitude_vector": np.ones(3)}, r"\(proj\.lora_magnitude_vector\)"),
        (a_pair() | {"img_in.bias": np.ones(72)}, r"\(img_in\.bias\)"),
        (a_pair() | {"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": np.ones((4, 72))}, "lora_A"),
        ({"img_in.lora_A.weight": np.ones((4, 64)), "img_in.lora_B.weight": np.ones((72, 3))}, r"\(72, 3\)"),
        ({"img_in.lora_A.weight": np.ones((4, 64, 1)), "img_in.lora_B.weight": np.ones((72, 4))}, r"\(4, 64, 1\)"),
        (a_pair() | {"double_blocks.0.img_attn.proj.alpha": np.ones(2)}, r"alpha holds 2 numbers"),
        (a_pair(rank=3), r"rank 3, adapter_config\.json says 4"),
    ],
)
def test_files_that_are_no_plain_lora(tmp_path, tensors, message):
    with pytest.raises(OsjaxError, match=message):
        convert(tmp_path, tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{peft_folder.PREFIX}transformer_blocks.0.to_q.lora_{part}.weight": np.ones((4, 4)) for part in "AB"},
        {f"{peft_folder.PREFIX}double_blocks.2.img_attn.proj.lora_{part}.weight": np.ones((4, 4)) for part in "AB"},
        {f"{peft_folder.PREFIX}double_blocks.0.img_attn.qkv.lora_{part}.weight": np.ones((4, 4)) for part in "AB"},
        {f"{peft_folder.PREFIX}double_blocks.0.img_attn.norm.lora_{part}.weight": np.ones((4, 4)) for part in "AB"},
    ],
    ids=["another model", "a layer too many", "the other layout", "no projection"],
)
@pytest.mark.parametrize("partly", [False, True])
def test_keys_without_a_place_are_listed(tmp_path, tensors, partly):
    with pytest.raises(OsjaxError) as caught:
        convert(tmp_path, tensors | (a_pair() if partly else {}))
    message = str(caught.value)
    assert all(key in message for key in tensors)
    assert not any(key in message for key in a_pair()), "only what is wrong"
    assert "\n" not in message


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "listed"),
    [((4, 71), (72, 4), "lora_A"), ((4, 72), (71, 4), "lora_B"), ((4, 72), (144, 4), "lora_B")],
)
@pytest.mark.parametrize("module", ["double_blocks.0.img_attn.proj", "single_blocks.0.q_proj"])
def test_other_shapes_are_listed(tmp_path, module, shape_a, shape_b, listed):
    tensors = {f"{module}.lora_A.weight": np.ones(shape_a), f"{module}.lora_B.weight": np.ones(shape_b)}
    with pytest.raises(OsjaxError, match=rf"wrong shapes: {module}\.{listed}\.weight"):
        convert(tmp_path, tensors)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["img_in"]},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"peft_type": "LOHA"},
        {"of_the_future": {"on": True}},
    ],
    ids=lambda option: next(iter(option)),
)
def test_more_than_plain_lora_is_refused(tmp_path, option):
    (name,) = option
    with pytest.raises(OsjaxError, match=rf"more than plain LoRA \({name} = "):
        convert(tmp_path, a_pair(), SETTINGS | option)


def test_options_that_change_nothing_are_taken(tmp_path):
    """All that peft 0.21 writes for a plain adapter."""
    plain = dict.fromkeys(("corda_config", "layer_replication", "modules_to_save", "use_bdlora", "velora_config"))
    plain |= dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), False)
    plain |= {"auto_mapping": {"base_model_class": "MMDiT"}, "init_lora_weights": True, "loftq_config": {}}
    plain |= {"inference_mode": True, "megatron_core": "megatron.core", "peft_version": "0.21.2", "revision": None}
    plain |= {"qalora_group_size": 16, "target_modules": ["proj"], "layers_to_transform": [0], "task_type": None}
    assert convert(tmp_path, a_pair(), SETTINGS | plain).modules == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"r": 4}', '{"r": "x", "lora_alpha": 1}', '{"r": 4, "lora_alpha": 1, "rank_pattern": {"(": 1}}'],
)
def test_a_config_that_cannot_be_read(tmp_path, text):
    folder = peft_folder.write(tmp_path, a_pair(), None, VIDEO.config)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(OsjaxError, match=r"adapter_config\.json"):
        prepare(folder / "adapter_model.safetensors")


def test_the_command_writes_a_lora(tmp_path, capsys):
    folder = peft_folder.write(tmp_path / "peft", a_pair(), SETTINGS, VIDEO.config)
    assert main([str(folder), str(tmp_path / "dry"), "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()
    assert main([str(folder), str(tmp_path / "made")]) == 0
    assert f"--lora {tmp_path / 'made'}" in capsys.readouterr().out
    made = adapters.read(tmp_path / "made")
    assert made.metadata["source"] == "adapter_model.safetensors"
    assert made.base["hidden_size"] == VIDEO.config["hidden_size"]
    np.testing.assert_array_equal(
        adapters.load(made).factors["double_blocks.img.proj"].b[0],
        2 * a_pair()[f"{peft_folder.PREFIX}double_blocks.0.img_attn.proj.lora_B.weight"].T,
    )

    for words, message in (
        ([str(folder), str(tmp_path / "made")], "exists"),
        ([str(folder), str(tmp_path / "x"), "--as", "mmdit"], "leave out --as"),
        ([str(folder), str(tmp_path / "x"), "--dtype", "bf16"], "leave out --as, --dtype and --quantize"),
        ([str(folder), str(tmp_path / "x"), "--quantize", "fp8"], "leave out --as, --dtype and --quantize"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_command_takes_a_bare_file_and_a_config(tmp_path, capsys):
    file = peft_folder.write(tmp_path, a_pair(), SETTINGS) / "adapter_model.safetensors"
    assert main([str(file), str(tmp_path / "made")]) == 2
    assert "--config FILE" in capsys.readouterr().err
    (tmp_path / "options.json").write_text(json.dumps(VIDEO.config))
    assert main([str(file), str(tmp_path / "made"), "--config", str(tmp_path / "options.json")]) == 0
    (tmp_path / "options.json").write_text(json.dumps({"colour": "red"}))
    assert main([str(file), str(tmp_path / "other"), "--config", str(tmp_path / "options.json")]) == 2
    assert "unknown MMDiT options colour" in capsys.readouterr().err
