"""The script that tells how near approximate choices come, on one clip of few steps."""

import sys

import jax
import jax.numpy as jnp

from launch import measure_nearness
from osjax.kernels.attention_ref import reference_attention
from osjax.sampling import caching


def test_what_leaves_nothing_out_is_exact(monkeypatch, capsys):
    """A share of 1 computes every step in full; a limit of 1 behind a share of 0 leaves out what it can."""
    usual = dict(caching.SPEEDS)
    words = ["measure_nearness.py", "--clips", "1", "--steps", "3", "--reuse", "1,inf", "0,inf,1"]
    monkeypatch.setattr(sys, "argv", words)
    measure_nearness.main()
    head, *rows = (line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines())
    assert head[0].startswith("choice")
    assert [row[0] for row in rows] == ["exact", "1, inf, inf", "0, inf, 1"]
    assert [row[2:] for row in rows[:2]] == [["inf", "inf"]] * 2
    assert int(rows[0][1]) == int(rows[1][1]) > int(rows[2][1])
    assert float(rows[2][2]) < 60
    assert usual == caching.SPEEDS


def test_attention_in_8_bits_is_near_the_exact_one():
    q, k, v = (jax.random.normal(key, (2, 50, 3, 64)) for key in jax.random.split(jax.random.key(1), 3))
    wanted = reference_attention(q, k, v)
    found = measure_nearness.attention_in_8_bits(q, k, v)
    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    assert 0.01 < error < 0.06  # as the kernel's own tests have it
