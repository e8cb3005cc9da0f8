"""The measurement of training steps: its count of operations against the compiler's, and a rehearsal of one row."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from launch import measure_training
from launch.measure_training import ADAPTER, TINY, Row, Training, operations, random_batch, rates, table
from osjax import leaves
from osjax.kernels.attention_ref import reference_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.sampling.geometry import LatentGrid

GRID = LatentGrid(t=10, h=20, w=20, patch=2)
# What the compiler counts and we do not: norms, modulation, embeddings, the adapter (half of 32/3072 · 7 in a block).
UNCOUNTED = 0.05


@pytest.fixture(scope="module")
def counted() -> tuple[float, float]:
    """Operations that the compiler finds in (forward, forward and backward): one block of each kind, full width."""
    config = MMDiTConfig(depth=1, depth_single_blocks=1, context_in_dim=64)
    training = Training(
        nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)), reference_attention
    )
    state, batch = jax.eval_shape(training.start), jax.eval_shape(lambda: random_batch(config, GRID, 1))
    arguments = state.weights, leaves.flatten(training.model), batch, jax.eval_shape(lambda: jax.random.key(0))
    loss = jax.jit(lambda *arguments: training.loss(*arguments, remat=False)[0])
    found = (
        jax.jit(function).lower(*arguments).cost_analysis()["flops"] for function in (loss, jax.value_and_grad(loss))
    )
    return tuple(found)


def test_operations_are_those_that_the_compiler_finds(counted):
    tokens = GRID.tokens + measure_training.TEXT_TOKENS
    forward, backward = operations(MMDiTConfig(depth=1, depth_single_blocks=1), tokens, 1)
    # Plain attention keeps its scores and so needs 2, not 2.5 times its forward pass.
    scores_again = 0.5 * 4 * tokens**2 * 3072 * 2
    assert counted[0] == pytest.approx(forward, rel=UNCOUNTED)
    # Gradients of the frozen weights would be half as much again.
    assert counted[1] == pytest.approx(forward + backward - scores_again, rel=UNCOUNTED)


def test_operations_of_the_published_model():
    forward, backward = operations(MMDiTConfig(), 8828, 1)
    # 6.45e9 weights in the blocks that a token meets, 57 attentions over 8 828 tokens.
    assert forward == pytest.approx(2 * 6.4553e9 * 8828 + 57 * 4 * 8828**2 * 3072, rel=1e-3)
    assert operations(MMDiTConfig(), 8828, 2) == (2 * forward, 2 * backward)


def test_a_row_is_measured_and_written(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["measure_training.py", "--tiny", "--rows", "1", "--runs", "1", "--out", str(out)])
    measure_training.main()
    results = json.loads(out.read_text())
    (figures,) = results["rows"].values()
    assert results["rank"] == ADAPTER.rank
    assert figures["step_s"] > figures["forward_s"] > 0
    assert figures["peak_gb"] > 0
    assert figures["useful_share"] < figures["with_remat_share"]
    assert "256px × 129, batch 1, blocks again" in capsys.readouterr().out


def test_a_row_without_memory_says_so():
    row = Row("768px", 129, 1, "blocks")
    figures = {"tokens": 76544, "peak_gb": 120.0, "failed": "out of memory"}
    assert rates(row, figures, TINY, 1e12) == {}
    assert "| 76544 |  |  | 120 |  |  |  | out of memory |" in table(
        {"matmul_tflops": 1.0, "rows": {str(row): figures}}
    )
