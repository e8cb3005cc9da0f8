"""Ulysses attention equals attention on one device, for lengths and head counts that do not divide the axis."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.kernels.attention_ref import reference_attention
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.parallel.specs import SPECS
from osjax.parallel.ulysses import JointSequence, ulysses_attention


@given(st.integers(0, 40), st.integers(1, 90), st.integers(1, 9))
def test_true_ranges_count_every_token_once(text, image, shards):
    sequence = JointSequence(text, image, shards)
    ranges = sequence.true_ranges()
    assert sum(stop - start for start, stop in ranges) == text + image
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "neighbours are merged, in order"
    assert ranges[-1][1] <= shards * (sequence.text_slice + sequence.image_slice)


def slices(x_bnhd, length: int, shards: int):
    """The tokens padded so that they cut into equal slices: [B, shards, slice, H, D]."""
    size = -(-length // shards)
    padded = np.pad(x_bnhd, ((0, 0), (0, size * shards - length), (0, 0), (0, 0)), constant_values=7.0)
    return padded.reshape(x_bnhd.shape[0], shards, size, *x_bnhd.shape[2:])


@pytest.mark.parametrize(
    ("text", "image", "heads", "shards"), [(8, 24, 4, 4), (5, 18, 3, 4), (7, 31, 3, 8), (3, 2, 2, 8)]
)
def test_equals_one_device(text, image, heads, shards):
    """Tolerance 1e-5: the bound promised for float32; only the order of sums differs. Padding holds sevens."""
    rng = np.random.default_rng(text * 100 + image)
    txt, img = (rng.normal(size=(3, 2, length, heads, 6)).astype(np.float32) for length in (text, image))
    expected = reference_attention(*np.concatenate([txt, img], axis=2))
    sequence = JointSequence(text, image, shards)
    joint = [
        np.concatenate([slices(t, text, shards), slices(i, image, shards)], axis=2)
        for t, i in zip(txt, img, strict=True)
    ]
    joint = [x.reshape(2, -1, heads, 6) for x in joint]
    spec = jax.sharding.PartitionSpec(None, SPECS.seq_axis)
    attention = functools.partial(ulysses_attention, sequence=sequence, attend=reference_attention, axis=SPECS.seq_axis)
    mesh = make_mesh(MeshShape(seq=shards))
    actual = jax.jit(jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))(*joint)
    by_shard = np.asarray(actual).reshape(2, shards, -1, heads, 6)
    out_txt = by_shard[:, :, : sequence.text_slice].reshape(2, -1, heads, 6)[:, :text]
    out_img = by_shard[:, :, sequence.text_slice :].reshape(2, -1, heads, 6)[:, :image]
    np.testing.assert_allclose(np.concatenate([out_txt, out_img], axis=1), expected, atol=1e-5)


def test_attention_in_chunks_equals_attention_at_once(monkeypatch):
    """The reference cuts the queries when scores would be large; float32 sums over the same keys: equal to 1e-6."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 37, 2, 8)).astype(np.float32)
    whole = reference_attention(q, k, v)
    monkeypatch.setattr("osjax.kernels.attention_ref.MAX_SCORES", 37 * 2 * 5)
    np.testing.assert_allclose(reference_attention(q, k, v), whole, atol=1e-6)
    assert whole.dtype == jnp.float32
