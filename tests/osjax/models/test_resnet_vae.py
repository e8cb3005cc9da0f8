"""Attention of the residual autoencoders against its definition; the rest is tested with the models made of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osjax.models.resnet_vae import FrameCausalAttention

TOLERANCE = 1e-5  # float32, the same sums in another order


def test_attention_is_softmax_under_the_frame_causal_mask():
    b, t, h, w, c = 2, 3, 2, 3, 4
    attention = FrameCausalAttention(c, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (b, t, h, w, c))
    tokens = attention.group_norm(x).reshape(b, t * h * w, c)
    q, k, v = (np.asarray(project(tokens), np.float64) for project in (attention.to_q, attention.to_k, attention.to_v))
    frame = np.arange(t * h * w) // (h * w)
    scores = np.where(frame[:, None] >= frame, q @ k.swapaxes(1, 2) / np.sqrt(c), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = weights @ v / weights.sum(-1, keepdims=True)
    expected = x + attention.to_out(attended.astype(np.float32)).reshape(x.shape)
    np.testing.assert_allclose(attention(x), expected, atol=TOLERANCE)
