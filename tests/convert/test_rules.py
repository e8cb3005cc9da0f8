"""The plan: both sides matched completely, or one error that lists everything; and its execution in memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.rules import Rule, Write, convert_module, plan
from osjax import leaves
from osjax.errors import OsjaxError

SAME = Write("scale", lambda tensor: tensor)
KERNEL = Write("blocks.kernel", lambda weight: weight.T)
RULES = [
    Rule(r"block\.(?P<layer>\d+)\.weight", (KERNEL,)),
    Rule(r"norm\.scale", (SAME,)),
    Rule(r"junk\..*"),
]


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


SOURCES = {"block.1.weight": shape(4, 3), "block.0.weight": shape(4, 3), "norm.scale": shape(5), "junk.a": shape(1)}
TARGETS = {"blocks.kernel": shape(2, 3, 4), "scale": shape(5)}


def test_a_complete_match_goes_layer_by_layer():
    found = plan(RULES, SOURCES, TARGETS)
    assert [(slab.leaf, slab.layer, slab.shape) for slab in found.slabs] == [
        ("scale", None, (5,)),
        ("blocks.kernel", 0, (3, 4)),
        ("blocks.kernel", 1, (3, 4)),
    ]
    assert found.unused == ("junk.a",)
    assert found.nbytes == 4 * (5 + 2 * 3 * 4)


def test_one_error_lists_all_that_is_wrong():
    sources = SOURCES | {"other": shape(1), "block.2.weight": shape(4, 3), "block.1.weight": shape(3, 4)}
    del sources["norm.scale"]
    with pytest.raises(OsjaxError) as caught:
        plan(RULES, sources, TARGETS)
    message = str(caught.value)
    assert "\n" not in message
    assert "unknown tensors: other, block.2.weight" in message
    assert "leaves not filled: scale" in message
    assert "block.1.weight gives (4, 3), blocks.kernel[1] takes (3, 4)" in message


def test_a_missing_layer_is_named():
    sources = {name: shape for name, shape in SOURCES.items() if name != "block.0.weight"}
    with pytest.raises(OsjaxError, match=r"leaves not filled: blocks\.kernel\[0\]"):
        plan(RULES, sources, TARGETS)


def test_two_tensors_for_one_place():
    rules = [*RULES, Rule("again", (SAME,))]
    with pytest.raises(OsjaxError, match=r"filled twice: scale \(by norm\.scale and again\)"):
        plan(rules, SOURCES | {"again": shape(5)}, TARGETS)


def test_a_stacked_leaf_is_not_filled_as_a_whole_too():
    rules = [*RULES, Rule("all", (Write("blocks.kernel", lambda tensor: tensor),))]
    with pytest.raises(OsjaxError, match="whole and by layers"):
        plan(rules, SOURCES | {"all": shape(2, 3, 4)}, TARGETS)


PARTS = {"q": shape(2, 3), "kv": shape(4, 3)}
LEAF = {"leaf": shape(3, 3, 2)}


def projections(kv_slot: slice) -> list[Rule]:
    return [
        Rule("q", (Write("leaf", lambda q: q.T, slot=(slice(None), 0)),)),
        Rule("kv", (Write("leaf", lambda kv: kv.reshape(2, 2, 3).transpose(2, 0, 1), slot=(slice(None), kv_slot)),)),
    ]


def test_slots_make_up_a_leaf():
    (slab,) = plan(projections(slice(1, 3)), PARTS, LEAF).slabs
    tensors = {"q": np.arange(6.0).reshape(2, 3), "kv": np.arange(6.0, 18.0).reshape(4, 3)}
    together = np.concatenate([tensors["q"], tensors["kv"]]).reshape(3, 2, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal(slab.assemble(tensors.__getitem__), together)


def test_overlapping_slots_and_gaps():
    with pytest.raises(OsjaxError, match=r"filled twice: leaf \(by q and kv\)"):
        plan(projections(slice(0, 2)), PARTS, LEAF)
    with pytest.raises(OsjaxError, match=r"leaves not filled: leaf \(in part\)"):
        plan(projections(slice(1, 3))[:1], {"q": PARTS["q"]}, LEAF)


def test_a_shape_that_the_rule_cannot_take():
    with pytest.raises(OsjaxError, match=r"wrong shapes: kv gives nothing from \(5, 3\)"):
        plan(projections(slice(1, 3)), PARTS | {"kv": shape(5, 3)}, LEAF)


@pytest.mark.parametrize(("held", "unused"), [(["a", "b"], ("b",)), (["b", "a"], ("b",)), (["a"], ()), (["b"], ())])
def test_an_alias_serves_when_the_other_name_is_absent(held, unused):
    rules = [Rule("b", (SAME,), alias=True), Rule("a", (SAME,))]
    found = plan(rules, {name: shape(5) for name in held}, {"scale": shape(5)})
    assert found.unused == unused
    assert found.slabs[0].fills[0].source == ("a" if "a" in held else "b")


def test_the_first_rule_that_matches_decides():
    found = plan([Rule("norm.*"), *RULES[:1], Rule("scale", (SAME,))], SOURCES_OF_BOTH, TARGETS)
    assert found.unused == ("norm.scale",)


SOURCES_OF_BOTH = {name: shape for name, shape in SOURCES.items() if name != "junk.a"} | {"scale": shape(5)}


class Toy(nnx.Module):
    def __init__(self, layers: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.blocks = nnx.vmap(lambda key: nnx.Linear(3, 4, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs(), layers)
        )
        self.scale = nnx.Param(jnp.ones(5, dtype))


TABLE = SimpleNamespace(
    read_config=lambda options: options["layers"],
    rules=lambda layers: RULES,
    build=lambda layers, dtype: Toy(layers, dtype, nnx.Rngs(0)),
)


def test_convert_module_fills_every_leaf():
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape.shape).astype(np.float32) for name, shape in SOURCES.items()}
    module = convert_module(TABLE, {"layers": 2}, tensors, jnp.bfloat16)
    held = leaves.flatten(module)
    kernel = np.stack([tensors["block.0.weight"].T, tensors["block.1.weight"].T])
    np.testing.assert_array_equal(held["blocks.kernel"], kernel.astype(jnp.bfloat16))
    np.testing.assert_array_equal(held["scale"], tensors["norm.scale"].astype(jnp.bfloat16))
