"""Latents and embeddings through caches: the same numbers, found only where they belong; and whole runs on files."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.media import write_mp4
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.sampling.latents import Text
from osjax.training import loop
from osjax.training.batches import Latents, put
from osjax.training.cache import Cache
from osjax.training.drawing import draw_clip
from osjax.training.encoding import latents_of, open_caches, texts_of
from osjax.training.options import DataOptions
from osjax.training.parts import export, load_weights, open_parts
from osjax.training.shapes import scene
from tests.osjax.training import micro

MESH = make_mesh(TrainingMeshShape(data=2, fsdp=2, tensor=2))
KEYS = [f"clip {number}" for number in range(4)]


def latents(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return put(
        Latents(draw((4, 2, 2, 2, 3)), {("head", 1): draw((4, 1, 2, 2, 3)), ("tail", 33): draw((4, 9, 2, 2, 3))}), MESH
    )


class Once:
    """Gives what it holds and counts how often it was asked."""

    def __init__(self, value):
        self.value, self.asked = value, 0

    def __call__(self):
        self.asked += 1
        return self.value


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


def test_a_miss_gives_what_a_hit_will_give(tmp_path):
    """Both are rounded to float16; else the second epoch would not be the first again."""
    cache, make = Cache(tmp_path, "vae"), Once(latents())
    first = latents_of(cache.look_up(KEYS), cache, MESH, make)
    second = latents_of(cache.look_up(KEYS), cache, MESH, make)
    assert make.asked == 1
    assert_same(first, second)
    assert_same(first, jax.tree.map(lambda each: np.asarray(each, np.float16), make.value))
    assert jax.tree.leaves(first)[0].sharding.shard_shape(first.z_bthwc.shape)[0] == 1


def test_rows_are_found_in_any_order(tmp_path):
    cache = Cache(tmp_path, "vae")
    first = latents_of(cache.look_up(KEYS), cache, MESH, Once(latents()))
    turned = latents_of(cache.look_up(KEYS[::-1]), cache, MESH, Once(None))
    assert_same(turned, jax.tree.map(lambda each: np.asarray(each)[::-1], first))


def test_a_batch_that_misses_one_row_is_made_whole(tmp_path):
    cache = Cache(tmp_path, "vae")
    latents_of(cache.look_up(KEYS), cache, MESH, Once(latents()))
    other = Once(latents(1))
    keys = [*KEYS[:3], "another clip"]
    made = latents_of(cache.look_up(keys), cache, MESH, other)
    assert other.asked == 1
    assert_same(latents_of(cache.look_up(keys), cache, MESH, Once(None)), made)


def test_embeddings_in_the_same_way(tmp_path):
    """However XLA laid them over the mesh."""
    cache = Cache(tmp_path, "t5")
    sharding = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("data", "fsdp"))
    pooled = jax.device_put(jnp.arange(32.0).reshape(4, 8), sharding)
    make = Once(Text(jnp.ones((4, 5, 6), jnp.bfloat16), pooled))
    first = texts_of(cache.look_up(KEYS), cache, MESH, make)
    assert_same(first, Text(np.ones((4, 5, 6), np.float16), np.asarray(pooled, np.float16)))
    assert_same(texts_of(cache.look_up(KEYS), cache, MESH, make), first)
    assert make.asked == 1


def test_without_a_cache_nothing_is_rounded_and_texts_stay_ids():
    made = latents()
    assert latents_of(None, None, MESH, lambda: made) is made
    assert texts_of(None, None, MESH, Once(None)) is None


def config_of(bundle, data, **run):
    """Of an MMDiT whose other parts are frozen."""
    config = micro.flow(batch_size=4, mesh="data=2,fsdp=2", **run)
    return dataclasses.replace(config, ckpt_path=str(bundle), new={}, trained=("mmdit",), data=data)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Eight clips of shapes, and one file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    rows = ["path,text,motion_score"]
    for number in range(8):
        write_mp4(folder / f"{number}.mp4", draw_clip(scene(1, number), 32, 32, 9), 24)
        rows.append(f"{number}.mp4,a shape of number {number},{number % 7 + 1}")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    path = folder / "clips.csv"
    path.write_text("\n".join([*rows, "broken.mp4,nothing,1", ""]))
    return path


def test_a_cache_changes_a_run_by_its_rounding_only(micro_bundle, table, tmp_path, caplog):
    """Latents and embeddings are of order one, and float16 rounds them by 2e-4 at most: the losses of four steps, in
    which Adam magnifies it, stay within 2e-3. Cold and warm the cache gives the same losses, bit for bit."""
    data = dataclasses.replace(micro.DATA, path=str(table))
    cached = dataclasses.replace(data, cache=str(tmp_path / "cache"))
    losses = []
    for number, each in enumerate((data, cached, cached)):
        with caplog.at_level(logging.WARNING):
            loop.run(config_of(micro_bundle, each, steps=4, save_every=4), tmp_path / str(number))
        losses.append(micro.losses(tmp_path / str(number)))
    plain, cold, warm = losses
    assert cold == warm
    np.testing.assert_allclose(cold, plain, rtol=2e-3)
    assert cold != plain
    assert "broken.mp4" in caplog.text
    # One for each clip and its two ends, one for each caption.
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == 8
    assert len(list((tmp_path / "cache" / "texts").rglob("*.safetensors"))) == 8


def test_every_model_has_its_own_entries(micro_bundle, tmp_path):
    """Another micro_bundle, or other ends: what the one makes the other never finds."""
    other = tmp_path / "other"
    parts = open_parts(str(micro_bundle), {}, ("vae",), jnp.float32)
    trained, frozen = load_weights(parts, make_mesh(TrainingMeshShape()), jax.random.key(0))
    export(parts, trained | frozen, other, {})
    config = config_of(micro_bundle, DataOptions(path="clips.csv", cache=str(tmp_path / "cache")))

    def caches(folder, ends):
        return open_caches(config, open_parts(str(folder), {}, ("mmdit",), jnp.float32), ends)

    ours = caches(micro_bundle, [("head", 1)])
    ours.latents.put("key", {"z": np.zeros(1)})
    ours.texts.put("key", {"z": np.zeros(1)})
    same, further, others = (
        caches(micro_bundle, [("head", 1)]),
        caches(micro_bundle, [("tail", 1)]),
        caches(other, [("head", 1)]),
    )
    assert [each.latents.get("key") is not None for each in (same, further, others)] == [True, False, False]
    assert [each.texts.get("key") is not None for each in (same, further, others)] == [True, True, False]


def test_no_cache_unless_asked_for(micro_bundle):
    parts = open_parts(str(micro_bundle), {}, ("mmdit",), jnp.float32)
    caches = open_caches(config_of(micro_bundle, DataOptions(path="clips.csv")), parts, [])
    assert caches.latents is None
    assert caches.texts is None


@pytest.mark.parametrize(
    ("path", "trained", "message"),
    [
        (None, ("mmdit",), r"data.cache keeps what is made of files: give data.path too, or for shapes data.clips"),
        ("clips.csv", ("mmdit", "t5", "clip"), r"cannot keep what clip, t5 makes, being trained: leave it out"),
        ("clips.csv", ("vae",), r"cannot keep what vae makes"),
    ],
)
def test_what_cannot_be_cached(micro_bundle, tmp_path, path, trained, message):
    config = config_of(micro_bundle, DataOptions(path=path, cache=str(tmp_path / "cache")))
    with pytest.raises(OsjaxError, match=message):
        open_caches(config, open_parts(str(micro_bundle), {}, trained, jnp.float32), [])
    assert not (tmp_path / "cache").exists()
