"""Streams of shapes: pure in the step, shared out over hosts, from every bucket."""

import collections
import contextlib
import dataclasses
import itertools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.training.batches import Latents
from osjax.training.buckets import make_buckets
from osjax.training.drawing import stack, tracks
from osjax.training.options import DataOptions
from osjax.training.procedural import WORDINGS, Share, drawn_stream, encoded_shelves, encoded_stream, said_stream
from osjax.training.shapes import BACKGROUNDS, COLORS, SCORES, SHAPES, scene
from osjax.training.text import TokenIds

DATA = DataOptions(resolution=("16px",), aspect_ratios=("1:1", "16:9"), num_frames=(1, 5), clips=32)
LONGEST = 240  # more characters than any caption has
BUCKETS = make_buckets(DATA.resolution, DATA.aspect_ratios, DATA.num_frames, 8)
NEW = dataclasses.replace(DATA, clips=0)
SEED = 11


def batch_at(stream, step):
    stream.set_state({"step": step})
    return next(stream)


def assert_same(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def joined(batches):
    """The tracks of several hosts' parts as one batch."""
    return jax.tree.map(lambda *fields: np.concatenate(fields), *(batch.tracks for batch in batches))


@given(step=st.integers(0, 10**6), hosts=st.integers(1, 4), clips=st.integers(1, 3))
@settings(deadline=None, max_examples=10)
def test_hosts_share_the_batch_that_one_would_make(step, hosts, clips):
    parts = []
    for index in range(hosts):
        with contextlib.closing(drawn_stream(NEW, BUCKETS, Share(clips, index, hosts), SEED)) as stream:
            parts.append(batch_at(stream, step))
    with contextlib.closing(drawn_stream(NEW, BUCKETS, Share(clips * hosts, 0, 1), SEED)) as stream:
        whole = batch_at(stream, step)
    assert {(part.height, part.width) for part in parts} == {(whole.height, whole.width)}
    assert_same(joined(parts), whole.tracks)
    numbers = [step * hosts * clips + i for i in range(hosts * clips)]
    frames = whole.tracks.radius.shape[-1]
    assert_same(whole.tracks, stack([tracks(scene(SEED, i), whole.height, whole.width, frames) for i in numbers]))


def test_a_batch_depends_on_its_step_and_the_seed_alone():
    streams = [drawn_stream(NEW, BUCKETS, Share(4, 0, 1), seed) for seed in (SEED, SEED, SEED + 1)]
    first, again, other = streams
    for _ in range(3):
        next(again)
    third, theirs = batch_at(first, 3), next(again)
    assert_same(third.tracks, theirs.tracks)
    assert third.captions == theirs.captions
    assert batch_at(first, 4).captions != third.captions
    assert batch_at(other, 3).captions != third.captions
    for stream in streams:
        stream.close()


def test_every_bucket_is_drawn_as_often():
    """Of 400 batches over four buckets; four deviations are 35."""
    with contextlib.closing(drawn_stream(NEW, BUCKETS, Share(1, 0, 1), SEED)) as stream:
        batches = [next(stream) for _ in range(400)]
    drawn = collections.Counter((batch.height, batch.width, batch.tracks.radius.shape[-1]) for batch in batches)
    assert drawn.keys() == {(bucket.height, bucket.width, bucket.num_frames) for bucket in BUCKETS}
    assert all(abs(count - 100) <= 35 for count in drawn.values())


def test_a_limited_number_of_scenes_is_drawn_from_again_by_any_number_of_hosts():
    """96 clips of 32: more than half of them are met, and no other."""
    with contextlib.closing(drawn_stream(DATA, BUCKETS, Share(4, 0, 1), SEED)) as stream:
        batches = [next(stream) for _ in range(24)]
        again = batch_at(stream, 7)
    assert_same(again.tracks, batches[7].tracks)
    halves = []
    for index in range(2):
        with contextlib.closing(drawn_stream(DATA, BUCKETS, Share(2, index, 2), SEED)) as stream:
            halves.append(batch_at(stream, 7))
    assert_same(joined(halves), again.tracks)
    frames = {
        bucket: [tracks(scene(SEED, i), bucket.height, bucket.width, bucket.num_frames) for i in range(32)]
        for bucket in BUCKETS
    }
    met = set()
    for batch in batches:
        size = (batch.height, batch.width, batch.tracks.radius.shape[-1])
        bucket = next(each for each in BUCKETS if (each.height, each.width, each.num_frames) == size)
        for centre in batch.tracks.centre:
            met.add(next(i for i, one in enumerate(frames[bucket]) if np.array_equal(one.centre, centre)))
    assert len(met) > 16


def letters(captions):
    """Captions as token ids: their characters."""
    ids = np.array([[ord(letter) for letter in caption.ljust(LONGEST)] for caption in captions], np.int32)
    return TokenIds(ids, ids)


@given(step=st.integers(0, 10**6), hosts=st.integers(1, 3), clips=st.integers(1, 3), limit=st.sampled_from((0, 7)))
@settings(deadline=None, max_examples=15)
def test_hosts_share_the_captions_that_one_would_write(step, hosts, clips, limit):
    data = dataclasses.replace(DATA, clips=limit)
    parts = []
    for index in range(hosts):
        with contextlib.closing(said_stream(data, Share(clips, index, hosts), SEED, letters)) as stream:
            parts.append(batch_at(stream, step))
    with contextlib.closing(said_stream(data, Share(clips * hosts, 0, 1), SEED, letters)) as stream:
        whole = batch_at(stream, step)
    assert_same(jax.tree.map(lambda *each: np.concatenate(each), *parts), whole)


def test_captions_without_clips_come_with_what_they_say():
    """The first thing that the sentence names has the first facts."""
    with contextlib.closing(said_stream(NEW, Share(200, 0, 1), SEED, letters)) as stream:
        batch = next(stream)
    seen = set()
    for ids, facts in zip(batch.prompts.t5_bl, batch.facts_bf, strict=True):
        caption = "".join(map(chr, ids)).rstrip()
        background, score, *things = facts
        names = [f"{[*COLORS, None][color]} {[*SHAPES, None][shape]}" for color, shape in (things[:2], things[5:7])]
        assert (tuple(BACKGROUNDS)[background] in caption) or "gray" in caption
        assert f"{SCORES[score]} motion score" in caption
        places = [caption.find(name) for name in names if name != "None None"]
        assert -1 not in places
        assert places == sorted(places)
        seen.add(len(places))
    assert seen == {1, 2}


def test_captions_tell_the_rate_and_the_motion():
    with contextlib.closing(drawn_stream(NEW, BUCKETS, Share(4, 0, 1), SEED)) as stream:
        batch = next(stream)
    scores = [scene(SEED, i).score for i in range(4)]
    assert all(
        text.endswith(f". 24 FPS. {score} motion score.") for text, score in zip(batch.captions, scores, strict=True)
    )


class Encoder:
    """Stands in for the autoencoder and keeps what it was asked for: the latents name their clip."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        centres = batch.tracks.centre[:, 0, 0, 0].astype(np.float16)
        self.batches.append(batch)
        z_bthwc = np.broadcast_to(centres[:, None, None, None, None], (len(centres), 2, batch.height, batch.width, 1))
        return Latents(z_bthwc, {("head", 1): -z_bthwc[:, :1]})


def code_points(texts):
    """Stands in for the tokenizers: characters as numbers, so that a caption can be read back."""
    ids_bl = np.array([[ord(letter) for letter in text.ljust(LONGEST)] for text in texts], np.int32)
    return TokenIds(ids_bl, ids_bl[:, ::-1])


def told_in(batch):
    """The captions of an encoded batch, which both text encoders are given."""
    np.testing.assert_array_equal(batch.prompts.t5_bl, batch.prompts.clip_bl[:, ::-1])
    return ["".join(map(chr, row)).rstrip() for row in batch.prompts.t5_bl]


def shelves_of(share, clips=DATA.clips):
    encoder = Encoder()
    data = DataOptions(**{**vars(DATA), "clips": clips})
    return encoder, encoded_shelves(data, BUCKETS, share, SEED, encoder, code_points, progress=False)


def scenes_of(share, clips=DATA.clips):
    """The tracks that were encoded, each as bytes."""
    encoder, _ = shelves_of(share, clips)
    return [centre.tobytes() for batch in encoder.batches for centre in batch.tracks.centre]


def test_clips_are_encoded_in_full_batches_as_many_of_each_bucket():
    encoder, shelves = shelves_of(Share(3, 0, 1))
    assert [len(batch.tracks.rgb) for batch in encoder.batches] == [3] * 8
    assert all(ids.shape == (6, WORDINGS, LONGEST) for shelf in shelves for ids in shelf.prompts)
    assert [shelf.z_nthwc.shape for shelf in shelves] == [(6, 2, each.height, each.width, 1) for each in BUCKETS]
    assert all(shelf.ends["head", 1].shape[:2] == (6, 1) for shelf in shelves)
    for shelf, batches in zip(shelves, np.split(np.arange(8), 4), strict=True):
        drawn = np.concatenate([encoder.batches[i].tracks.centre[:, 0, 0, 0] for i in batches]).astype(np.float16)
        np.testing.assert_array_equal(shelf.z_nthwc[:, 0, 0, 0, 0], drawn)


def test_fewer_clips_than_a_batch_are_one_batch_a_bucket():
    _, shelves = shelves_of(Share(4, 0, 1), clips=1)
    assert [len(shelf.z_nthwc) for shelf in shelves] == [4] * 4


def test_hosts_encode_different_scenes_that_are_together_those_of_one():
    shares = [Share(2, 0, 2), Share(2, 1, 2), Share(4, 0, 1)]
    first, second, whole = map(scenes_of, shares)
    assert len(first) == len(second) == len(whole) // 2 == 16
    assert sorted(first + second) == sorted(whole)
    assert len(set(whole)) == 32


def test_encoded_batches_come_from_every_shelf_and_are_told_in_new_words():
    _, shelves = shelves_of(Share(4, 0, 1))
    with contextlib.closing(encoded_stream(shelves, 4, SEED)) as stream:
        batches = [next(stream) for _ in range(60)]
    assert {batch.z_bthwc.shape[2:4] + batch.z_bthwc.shape[:1] for batch in batches} == {
        (bucket.height, bucket.width, 4) for bucket in BUCKETS
    }
    told = collections.defaultdict(set)
    for batch in batches:
        np.testing.assert_array_equal(batch.ends["head", 1], -batch.z_bthwc[:, :1])
        marks = batch.z_bthwc[:, 0, 0, 0, 0].tolist()
        assert len(set(marks)) == 4  # no clip twice in a batch while there are enough
        for mark, caption in zip(marks, told_in(batch), strict=True):
            told[mark, batch.z_bthwc.shape].add(caption)
    assert np.mean([len(captions) for captions in told.values()]) > WORDINGS / 2


def test_encoded_batches_are_pure_functions_of_the_step():
    _, shelves = shelves_of(Share(4, 0, 1))
    first, second = (encoded_stream(shelves, 4, SEED) for _ in range(2))
    for _ in range(5):
        next(first)
    ours, theirs = next(first), batch_at(second, 5)
    np.testing.assert_array_equal(ours.z_bthwc, theirs.z_bthwc)
    assert told_in(ours) == told_in(theirs)
    first.close()
    second.close()


def test_captions_are_of_the_clips_beside_them():
    """The motion score is that of the scene whose latents stand in the same row."""
    _, shelves = shelves_of(Share(4, 0, 1))
    with contextlib.closing(encoded_stream(shelves, 4, SEED)) as stream:
        batches = [next(stream) for _ in range(10)]
    scores = (scene(SEED, number).score for number in itertools.count())
    marks = {
        (mark, shelf.z_nthwc.shape[2:]): score
        for shelf in shelves
        for mark, score in zip(shelf.z_nthwc[:, 0, 0, 0, 0].tolist(), scores, strict=False)
    }
    for batch in batches:
        for mark, caption in zip(batch.z_bthwc[:, 0, 0, 0, 0].tolist(), told_in(batch), strict=True):
            assert caption.endswith(f"{marks[mark, batch.z_bthwc.shape[2:]]} motion score.")


def test_more_clips_than_there_are_come_twice():
    _, shelves = shelves_of(Share(2, 0, 1), clips=8)
    with contextlib.closing(encoded_stream(shelves, 6, SEED)) as stream:
        assert len(told_in(next(stream))) == 6
