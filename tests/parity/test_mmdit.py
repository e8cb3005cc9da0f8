"""MMDiT against the reference: embeddings, RoPE tables, every block, the output. Kind `mmdit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import mmdit as table
from convert.rules import convert_module
from osjax.kernels.attention_ref import reference_attention
from osjax.models.layers import timestep_embedding
from osjax.models.rope import after_text, rope_table
from tests.parity import cases


def build(case: cases.Case):
    return convert_module(table, case.config, case.weights, jnp.float32)


def inputs(case: cases.Case) -> dict[str, np.ndarray | None]:
    given = case.inputs
    return {
        "img_bnc": given["img"],
        "txt_blc": given["txt"],
        "vec_bp": given["y_vec"],
        "t_b": given["timesteps"],
        "cond_bnc": given.get("cond"),
        "guidance_b": given.get("guidance"),
    }


def layer(stack, index: int):
    return jax.tree.map(lambda leaf: leaf[index], stack)


@pytest.fixture(scope="module", params=cases.of_kind("mmdit"), ids=cases.case_id)
def built(request):
    case = request.param
    model = build(case)
    rope = rope_table(case.inputs["img_ids"], model.config.axes_dim, model.config.theta)
    return case, model, rope


def test_rope_table(built):
    case, _, rope = built
    assert not case.inputs["txt_ids"].any()
    joint = after_text(rope, case.inputs["txt"].shape[1])
    if "pe_cos" in case.outputs:
        for name, half in (("pe_cos", joint.cos_bnd), ("pe_sin", joint.sin_bnd)):
            cases.assert_close(np.concatenate([half, half], axis=-1), case.outputs[name], what=name)
    else:
        matrices = np.stack([joint.cos_bnd, -joint.sin_bnd, joint.sin_bnd, joint.cos_bnd], axis=-1)
        pe = case.outputs["pe"]
        cases.assert_close(matrices[:, None].reshape(pe.shape), pe, what="pe")


def test_embeddings(built):
    case, model, _ = built
    embedded = jax.jit(lambda m, given: m.embed(**given))(model, inputs(case))
    for value, name in zip(embedded, ("img", "txt", "vec"), strict=True):
        cases.assert_close(value, case.outputs[f"embed.{name}"], what=name)
    if "timestep_embedding" in case.outputs:
        embedding = timestep_embedding(case.inputs["timesteps"])
        cases.assert_close(embedding, case.outputs["timestep_embedding"], what="timestep_embedding")


def test_blocks_one_by_one(built):
    """Each block from the reference's own streams, so that an error shows in the block that makes it."""
    case, model, rope = built
    out = case.outputs
    vec = out["embed.vec"]
    img, txt = out["embed.img"], out["embed.txt"]
    double = jax.jit(lambda block, img, txt: block(img, txt, vec, rope, reference_attention))
    for index in range(model.config.depth):
        actual_img, actual_txt = double(layer(model.double_blocks, index), img, txt)
        img, txt = out[f"double_blocks.{index}.img"], out[f"double_blocks.{index}.txt"]
        cases.assert_close(actual_img, img, what=f"double block {index}, img")
        cases.assert_close(actual_txt, txt, what=f"double block {index}, txt")
    joint_rope = after_text(rope, txt.shape[1])
    single = jax.jit(lambda block, x: block(x, vec, joint_rope, reference_attention))
    x = np.concatenate([txt, img], axis=1)
    for index in range(model.config.depth_single_blocks):
        actual = single(layer(model.single_blocks, index), x)
        x = out[f"single_blocks.{index}.x"]
        cases.assert_close(actual, x, what=f"single block {index}")


def test_output(built):
    """The whole pass through both scans; equal to the loop over blocks because both equal the reference."""
    case, model, rope = built
    output = jax.jit(lambda m, given: m(**given, rope=rope, attention=reference_attention))(model, inputs(case))
    cases.assert_close(output, case.outputs["output"], what="output")
