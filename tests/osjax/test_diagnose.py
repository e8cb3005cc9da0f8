"""Where a run stops being finite: weights that overflow in one known block, in every model and on a mesh."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from osjax import leaves
from osjax.diagnose import first_bad_layer, not_finite
from osjax.errors import OsjaxError
from osjax.models.autoencoder_2d import Autoencoder2D, Autoencoder2DConfig
from osjax.models.clip import CLIPText, CLIPTextConfig
from osjax.models.dc_ae import DCAE, DCAEConfig
from osjax.models.streamed import cut
from osjax.parallel.host_memory import to_host
from osjax.pipeline import Pipeline
from osjax.request import Request

REQUEST = Request("a cat", resolution=None, height=32, width=48, num_frames=5, num_steps=3)


def scaled(model, leaf, factor, layer=...):
    """The model with one leaf, or one layer of it, multiplied."""
    arrays = leaves.flatten(model)
    arrays[leaf] = arrays[leaf].at[layer].multiply(factor)
    return leaves.unflatten(model, arrays)


def broken(component, leaf, factor, layer=..., dtype="fp16", mesh="data=1,seq=1") -> Pipeline:
    """The embedded bundle with weights that overflow."""
    pipeline = Pipeline.load(dtype=dtype, mesh=mesh, progress=False)
    with pipeline.residency.on_device(component) as model:
        pipeline.residency._modules[component] = scaled(model, leaf, factor, layer)
    return pipeline


def test_half_precision_is_finite_and_close():
    """With steps enough for latents as the autoencoder knows them: after 3 their deviation is 3, its activations leave
    the range of float16, and what is clipped there shows."""
    asked = dataclasses.replace(REQUEST, num_steps=10)
    half, full = (Pipeline.load(dtype=dtype, progress=False)(asked).frames.astype(int) for dtype in ("fp16", "fp32"))
    assert abs(half - full).mean() < 2
    assert half.std() > 0


@pytest.mark.parametrize(
    ("component", "leaf", "layer", "options", "says"),
    [
        ("mmdit", "single_blocks.mlp_in.kernel", 3, {}, "after step 1 of 3 .* in single block 4: .*use --dtype bf16"),
        ("mmdit", "double_blocks.img.mlp_in.kernel", 1, {"mesh": "data=2,seq=4"}, "first in double block 2: "),
        ("mmdit", "final_layer.linear.kernel", ..., {}, "first in the final layer: "),
        ("mmdit", "img_in.kernel", ..., {}, "first before double block 1: "),
        ("t5", "blocks.attention_norm.scale", 1, {}, "embeddings of the prompts .* in block 2 of T5: "),
    ],
)  # fmt: skip
def test_the_first_block_is_named(component, leaf, layer, options, says):
    with pytest.raises(OsjaxError, match=says) as told:
        broken(component, leaf, 6e4 if component == "mmdit" else jnp.inf, layer, **options)(REQUEST)
    assert "nothing was saved" in str(told.value)


@pytest.mark.parametrize(
    ("leaf", "layer", "says"),
    [
        ("single_blocks.mlp_in.kernel", 3, "after step 1 of 3 .* in single block 4: .*use --dtype bf16"),
        ("double_blocks.img.mlp_in.kernel", 1, "first in double block 2: "),
        ("final_layer.linear.kernel", ..., "first in the final layer: "),
        ("img_in.kernel", ..., "first before double block 1: "),
    ],
)
def test_the_first_block_is_named_where_they_come_one_by_one(leaf, layer, says):
    with broken("mmdit", leaf, 6e4, layer).residency.on_device("mmdit") as model:
        layers = to_host(cut(model))
    pipeline = Pipeline.load(dtype="fp16", offload=True, offload_blocks=True, progress=False)
    pipeline.residency._waiting["mmdit"] = layers
    with pytest.raises(OsjaxError, match=says):
        pipeline(REQUEST)


def test_frames_that_are_not_finite_name_the_level():
    with pytest.raises(OsjaxError, match="frames are not finite, first in level 2 of the decoder"):
        broken("vae", "decoder.levels.1.resnets.0.conv1.bias", jnp.nan)(REQUEST)


def test_references_that_are_not_finite_name_the_level():
    pipeline = broken("vae", "encoder.levels.2.resnets.0.conv1.bias", jnp.nan)
    with pytest.raises(OsjaxError, match="latents of a reference are not finite, first in level 3 of the encoder"):
        pipeline.encode_references(REQUEST, [jnp.zeros((1, 32, 48, 3))])


def test_elsewhere_than_in_half_precision_the_weights_are_to_blame():
    with pytest.raises(OsjaxError, match="in double block 1: nothing was saved; convert the bundle again"):
        broken("mmdit", "double_blocks.txt.mlp_in.kernel", jnp.nan, 0, dtype="fp32")(REQUEST)


def test_latents_that_no_layer_is_to_blame_for():
    pipeline = Pipeline.load(dtype="fp32", progress=False)
    with pytest.raises(OsjaxError, match="not finite: nothing was saved; try a lower guidance"):
        pipeline(Request(**{**vars(REQUEST), "guidance": 3.4e38}))


CLIP = CLIPTextConfig(
    hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=9, eos_token_id=8
)
STAGES = {"widths": (8, 32), "depths": (1, 1), "attention": (False, True), "time": (True, False)}
ENDS = ("encoder", "decoder")
DC_AE = DCAEConfig(latent_channels=4, **{f"{end}_{what}": STAGES[what] for end in ENDS for what in STAGES})
IMAGE_AE = Autoencoder2DConfig(ch=32, ch_mult=(1, 1))


def clip():
    return CLIPText(CLIP, rngs=nnx.Rngs(0)), lambda model: model(jnp.zeros((1, 5), int))


def dc_ae_decoder():
    return DCAE(DC_AE, rngs=nnx.Rngs(0)), lambda model: model.decode(jnp.ones((1, 2, 2, 2, 4)))


def dc_ae_encoder():
    return DCAE(DC_AE, rngs=nnx.Rngs(0)), lambda model: model.encode(jnp.ones((1, 2, 4, 4, 3)))


def image_encoder():
    return Autoencoder2D(IMAGE_AE, rngs=nnx.Rngs(0)), lambda model: model.encode(jnp.ones((1, 1, 4, 4, 3)))


@pytest.mark.parametrize(
    ("case", "leaf", "layer", "says"),
    [
        (clip, "blocks.fc1.bias", 2, "in block 3 of CLIP"),
        (dc_ae_decoder, "decoder.stages.0.0.norm.bias", ..., "in block 1 of stage 1 of the decoder"),
        (dc_ae_encoder, "encoder.stages.1.0.unit.norm.bias", ..., "in block 1 of stage 2 of the encoder"),
        (image_encoder, "encoder.mid_block.resnets.0.conv1.bias", ..., "in the middle of the encoder"),
    ],
)
def test_every_kind_of_model(case, leaf, layer, says):
    model, run = case()
    assert first_bad_layer(model, run) is None
    assert first_bad_layer(scaled(model, leaf, jnp.nan, layer), run) == says


def test_the_error_without_a_layer():
    assert str(not_finite("it is", None, jnp.float16, "mend it")) == "it is not finite: nothing was saved; mend it"
