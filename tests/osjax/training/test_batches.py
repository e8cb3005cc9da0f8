"""Batches onto the mesh and back, and the encoding of ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osjax.errors import OsjaxError
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.training.batches import Drawn, Latents, encode, local_batch, local_rows, put, video_of
from osjax.training.buckets import Bucket
from osjax.training.drawing import draw, stack, tracks
from osjax.training.loader import Batch
from osjax.training.shapes import scene
from tests.osjax.training import micro

MESHES = [
    TrainingMeshShape(),
    TrainingMeshShape(data=2, fsdp=4),
    TrainingMeshShape(2, 2, 2),
    TrainingMeshShape(tensor=8),
]
BUCKET = Bucket("16px", "1:1", 5, 16, 16)


@pytest.mark.parametrize("mesh", map(make_mesh, MESHES), ids=map(str, MESHES))
@pytest.mark.parametrize(
    "spec", [P(("data", "fsdp")), P(), P(None, "fsdp"), P("fsdp", "data"), P(None, ("data", "tensor"))]
)
def test_rows_come_back_however_they_lie(mesh, spec):
    """XLA chooses how what it computes lies: the features of CLIP's pooled text are cut over fsdp, for one."""
    array = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    tree = {"a": jax.device_put(array, NamedSharding(mesh, spec)), "b": put(array[:, 0], mesh)}
    rows = local_rows(tree, mesh)
    np.testing.assert_array_equal(rows["a"], array.astype(np.float16), strict=True)
    np.testing.assert_array_equal(rows["b"], array[:, 0].astype(np.float16), strict=True)


def test_a_batch_is_cut_along_its_rows():
    mesh = make_mesh(TrainingMeshShape(2, 2, 2))
    latents = put(Latents(np.zeros((8, 2, 2, 2, 4)), {("head", 1): np.zeros((8, 1, 2, 2, 4))}), mesh)
    for each in jax.tree.leaves(latents):
        assert each.sharding.shard_shape(each.shape) == (2, *each.shape[1:])


@given(mesh=st.sampled_from(MESHES).map(make_mesh), size=st.integers(1, 40))
def test_batches_divide_over_the_mesh_or_are_refused(mesh, size):
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % devices == 0:
        assert local_batch(size, mesh) == size
        return
    with pytest.raises(OsjaxError, match=f"batch_size {size} does not divide .* = {devices} devices: use a") as caught:
        local_batch(size, mesh)
    named = int(str(caught.value).rsplit(maxsplit=1)[1])
    assert named > size
    assert local_batch(named, mesh) == named


def test_drawn_and_read_videos_are_in_the_range_of_the_models():
    mesh = make_mesh(TrainingMeshShape(data=2))
    batch = stack([tracks(scene(0, number), 16, 16, 5) for number in range(2)])
    drawn = video_of(Drawn(batch, 16, 16, lambda: ["", ""]), mesh)
    np.testing.assert_allclose(drawn, draw(batch, 16, 16), atol=2e-6)  # another program, roundings of float32
    pixels = np.zeros((2, 5, 16, 16, 3), np.uint8)
    pixels[1] = 255
    video = video_of(Batch(BUCKET, (0, 1), ["", ""], pixels, None, None), mesh)
    assert video.dtype == jnp.float32
    np.testing.assert_array_equal(np.unique(video[0]), [-1.0])
    np.testing.assert_array_equal(np.unique(video[1]), [1.0])


def test_a_host_that_needs_no_video_brings_one_of_the_same_shape():
    """All hosts encode together if one of them has to."""
    video = video_of(Batch(BUCKET, (3, 4, 5), [""] * 3, None, None, None), make_mesh(TrainingMeshShape()))
    assert video.shape == (3, 5, 16, 16, 3)


def test_ends_are_encoded_by_themselves():
    config = HunyuanVAEConfig(**{name: value for name, value in micro.VAE.items() if name != "kind"})
    vae = HunyuanVAE(config, rngs=nnx.Rngs(0))
    video = jax.random.uniform(jax.random.key(0), (2, 9, 8, 8, 3), minval=-1)
    z_bthwc, ends = jax.jit(encode, static_argnums=2)(vae, video, frozenset({("head", 1), ("tail", 5)}))
    assert z_bthwc.shape == (2, 3, 2, 2, 4)
    # float32 through some ten layers, computed in another program.
    np.testing.assert_allclose(z_bthwc, vae.encode(video), atol=1e-5)
    np.testing.assert_allclose(ends["head", 1], vae.encode(video[:, :1]), atol=1e-5)
    np.testing.assert_allclose(ends["tail", 5], vae.encode(video[:, 4:]), atol=1e-5)
    assert np.abs(ends["tail", 5] - z_bthwc[:, 1:]).max() > 0.01
