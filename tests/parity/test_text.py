"""Text encoders against the reference: every run and every output. Kinds `t5` and `clip`."""

import jax
import jax.numpy as jnp
import pytest

from convert import clip, t5
from convert.rules import convert_module
from tests.parity import cases


def check(case: cases.Case, run: str, table, name_outputs):
    """`name_outputs`: what the module returns -> the manifest's names; an output that it does not name is an error."""
    module = convert_module(table, case.config, case.weights, jnp.float32)
    ids_bl = jnp.asarray(case.run(run, "inputs")["input_ids"], jnp.int32)
    found = name_outputs(jax.jit(module)(ids_bl))
    expected = case.run(run, "outputs")
    assert expected
    for name, reference in expected.items():
        cases.assert_close(found[name], reference, cases.PASS_TOLERANCE, f"{case.name}/{run}/{name}")


@pytest.mark.parametrize(("case", "run"), cases.runs_of_kind("t5"), ids=cases.case_id)
def test_t5(case, run):
    check(case, run, t5, lambda states: {"last_hidden_state": states})


@pytest.mark.parametrize(("case", "run"), cases.runs_of_kind("clip"), ids=cases.case_id)
def test_clip(case, run):
    check(case, run, clip, lambda outputs: dict(zip(("last_hidden_state", "pooler_output"), outputs, strict=True)))
