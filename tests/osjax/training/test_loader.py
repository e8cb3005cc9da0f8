"""Batches from files: what they hold, that resuming is exact, what happens to files that cannot be read."""

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.training.buckets import cut_of, make_buckets
from osjax.training.cache import Cache, text_key
from osjax.training.clips import read_cut
from osjax.training.loader import Loader, open_loader
from osjax.training.options import DataOptions
from osjax.training.table import Clip, read_table, write_table
from tests.osjax.training.clip_files import frame_numbers, write_ramp

BUCKETS = make_buckets(["48px"], ["16:9", "1:1"], [5, 9])
WIDE, SQUARE = (32, 64), (48, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of 5 to 21 frames, wide and square; two broken ones; one shorter than its row of the table says."""
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for number, num_frames in enumerate((5, 6, 12, 15, 21, 5, 19, 9)):
        size = (WIDE, SQUARE)[number % 2]
        path = write_ramp(folder / f"{number}.mp4", num_frames, *size)
        clips.append(Clip(path.name, f"clip {number}", num_frames, *size, 24.0))
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    clips.insert(2, Clip("broken.mp4", "broken", 20, *WIDE, 24.0))
    clips.insert(5, Clip("gone.mp4", "gone", 5, *SQUARE, 24.0))
    write_ramp(folder / "short.mp4", 9, *WIDE)
    clips.append(Clip("short.mp4", "short", 30, *WIDE, 24.0))
    write_table(folder / "data.csv", clips)
    return folder


@pytest.fixture
def clips(folder):
    return read_table(folder / "data.csv", progress=False)


@pytest.fixture
def loading(clips):
    """Makes loaders of those clips, and closes them."""
    loaders = []

    def load(clips=clips, buckets=BUCKETS, *, fps=24, rows=4, seed=0, **options):
        loaders.append(Loader(clips, buckets, fps=fps, rows=rows, seed=seed, workers=2, **options))
        return loaders[-1]

    yield load
    for loader in loaders:
        loader.close()


def take(loader, count):
    return [next(loader) for _ in range(count)]


def digests(batches):
    """What can be told of batches from outside, as text."""
    return [
        hashlib.sha256(
            repr((batch.bucket, batch.indices, batch.captions)).encode() + batch.video_bthwc.tobytes()
        ).hexdigest()
        for batch in batches
    ]


def test_a_batch_shows_its_clips(loading, clips):
    for batch in take(loading(), 8):
        bucket = batch.bucket
        assert batch.video_bthwc.dtype == np.uint8
        assert batch.video_bthwc.shape == (4, bucket.num_frames, bucket.height, bucket.width, 3)
        assert batch.latents is batch.texts is None
        for index, caption, frames in zip(batch.indices, batch.captions, batch.video_bthwc, strict=True):
            clip = clips[index]
            assert caption == f"{clip.text}. 24 FPS."
            first = frame_numbers(frames)[0]
            assert first % bucket.num_frames == 0
            assert frame_numbers(frames) == list(range(first, first + bucket.num_frames))
            cut = dataclasses.replace(cut_of(clip, bucket, 24, 0), start=first)
            np.testing.assert_array_equal(frames, read_cut(clip.path, cut, bucket.height, bucket.width))


def test_every_sound_clip_is_shown_with_all_its_pieces(loading, clips):
    """Also the pieces of a file that ends before its last one, which alone is passed over."""
    seen = set()
    for batch in take(loading(), 40):
        numbers = [frame_numbers(frames)[0] for frames in batch.video_bthwc]
        seen |= {(clips[index].text, number) for index, number in zip(batch.indices, numbers, strict=True)}
    assert seen == {
        ("clip 0", 0), ("clip 1", 0), ("clip 2", 0), ("clip 3", 0), ("clip 4", 0), ("clip 4", 9), ("clip 5", 0),
        ("clip 6", 0), ("clip 6", 9), ("clip 7", 0), ("short", 0),
    }  # fmt: skip


def test_captions_say_the_rate_and_the_motion_score(loading, clips):
    fast = [dataclasses.replace(clips[0], num_frames=5, fps=59.94, motion_score=4.0, text="a cat")]
    loader = loading(fast, make_buckets(["48px"], ["16:9"], [3]), rows=1)
    batch = next(loader)
    assert batch.captions == ["a cat. 30 FPS. 4 motion score."]
    assert frame_numbers(batch.video_bthwc[0]) == [0, 2, 4]
    half = [dataclasses.replace(fast[0], fps=24.0, motion_score=2.5)]
    assert next(loading(half, BUCKETS, rows=1)).captions == ["a cat. 24 FPS. 2.5 motion score."]


@given(before=st.integers(0, 9), between=st.integers(0, 4))
@settings(deadline=None, max_examples=4)
def test_after_set_state_the_same_batches_follow(folder, before, between):
    """With two broken files, and one of which only some pieces can be read, known or not yet known as such."""
    clips = read_table(folder / "data.csv", progress=False)
    loader, fresh = (Loader(clips, BUCKETS, fps=24, rows=4, seed=3) for _ in range(2))
    take(loader, before)
    state = json.loads(json.dumps(loader.get_state()))
    expected = digests(take(loader, 4))
    take(loader, between)
    loader.set_state(state)
    fresh.set_state(state)
    assert digests(take(loader, 4)) == digests(take(fresh, 4)) == expected
    loader.close()
    fresh.close()


def test_another_process_goes_on_with_the_same_batches(loading, folder):
    loader = loading(seed=7)
    take(loader, 5)
    code = (
        "import json, sys\n"
        "from tests.osjax.training.test_loader import *\n"
        f"clips = read_table({str(folder / 'data.csv')!r}, progress=False)\n"
        "loader = Loader(clips, BUCKETS, fps=24, rows=4, seed=7)\n"
        f"loader.set_state(json.loads({json.dumps(loader.get_state())!r}))\n"
        "print(json.dumps(digests(take(loader, 12))))\n"
        "loader.close()\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests(take(loader, 12))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_that_one_would_read(loading, count):
    alone = loading(rows=4)
    shares = [loading(rows=4 // count, process_index=index, process_count=count) for index in range(count)]
    for _ in range(10):
        whole, parts = next(alone), [next(share) for share in shares]
        assert {part.bucket for part in parts} == {whole.bucket}
        assert sum((part.indices for part in parts), ()) == whole.indices
        np.testing.assert_array_equal(np.concatenate([part.video_bthwc for part in parts]), whole.video_bthwc)


def test_seeds_differ(loading):
    first, second = ([batch.indices for batch in take(loading(seed=seed), 10)] for seed in (0, 1))
    assert first != second


def test_broken_files_are_named_once_and_counted(loading, clips, caplog):
    loader = loading()
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 40)
        loader.close()
    assert not any("broken" in text or "gone" in text for batch in batches for text in batch.captions)
    broken, gone, short = (clips[index].path for index in (2, 5, 10))
    assert loader.broken == {
        broken: "is not a readable video",
        gone: "does not exist",
        short: loader.broken[short],
    }
    assert loader.broken[short] in ("ends before frame 18", "ends before frame 27")
    *each, summary = [record.getMessage() for record in caplog.records]
    assert sorted(each) == sorted(f"{path} {reason}: mend or remove it" for path, reason in loader.broken.items())
    assert summary.startswith("3 files could not be used: ")
    assert all(path in summary for path in (broken, gone, short))


def test_a_bucket_of_broken_files_only_is_an_error(loading, clips):
    loader = loading([clips[2], clips[2], clips[4]], rows=1)
    with pytest.raises(
        OsjaxError, match=r"none of the 2 clips for 48px 16:9 of 9 frames can be read \(such as .*broken"
    ):
        take(loader, 3)


def test_clips_that_fit_no_bucket_are_counted_and_named(loading, clips, caplog):
    with caplog.at_level(logging.INFO):
        loading([*clips[:2], dataclasses.replace(clips[3], height=30, width=30)], make_buckets(["48px"], ["1:1"], [6]))
    assert [record.getMessage() for record in caplog.records] == [
        "48px 1:1 of 6 frames: 1 clips",
        f"1 of 3 clips are left out, being too short: {clips[0].path}",
        f"1 of 3 clips are left out, being too small: {clips[3].path}",
    ]


def test_long_lists_are_cut(loading, clips, caplog):
    loading([clips[0]] * 30 + [clips[3]], make_buckets(["48px"], ["1:1"], [9]))
    assert caplog.records[-1].getMessage().endswith(f"{clips[0].path} and 10 more")


def test_no_clip_fits(loading):
    with pytest.raises(
        OsjaxError, match=r"none of 11 clips fits a bucket \(11 are shorter than 65 frames, 0 have too few"
    ):
        loading(buckets=make_buckets(["48px"], ["1:1"], [65]))
    with pytest.raises(
        OsjaxError, match=r"0 are shorter than 5 frames, 11 have too few pixels\): change data.num_frames"
    ):
        loading(buckets=make_buckets(["96px"], ["1:1"], [5]))


def test_states_of_other_data_are_refused(loading, clips):
    state = loading().get_state()
    loading().set_state(state)
    for other in (loading(clips[1:]), loading(seed=1), loading(rows=2), loading(buckets=BUCKETS[:1])):
        with pytest.raises(OsjaxError, match="the clips, their buckets, the batch size or the seed are not those"):
            other.set_state(state)
    with pytest.raises(OsjaxError, match="are not those this run was started with: restore them"):
        loading().set_state({"step": 3})


def test_what_is_cached_is_not_read(loading, clips, tmp_path):
    """At first batches come with frames, and the keys to put what is made of them; then with what was put."""
    latents, texts = Cache(tmp_path, "vae"), Cache(tmp_path, "t5")
    some, buckets = [*clips[:4], clips[10]], BUCKETS[:2]
    expected = take(loading(some, buckets, rows=2), 12)
    first = take(loading(some, buckets, rows=2, latents=latents, texts=texts), 12)
    for batch, plain in zip(first, expected, strict=True):
        assert batch.indices == plain.indices
        assert batch.latents.arrays is batch.texts.arrays is None
        np.testing.assert_array_equal(batch.video_bthwc, plain.video_bthwc)
        for key, text, frames in zip(batch.latents.keys, batch.texts.keys, batch.video_bthwc, strict=True):
            latents.put(key, {"mean": frames.mean((1, 2, 3))})
            texts.put(text, {"key": np.frombuffer(text.encode(), np.uint8)})
    loader = loading(some, buckets, rows=2, latents=latents, texts=texts)
    take(loader, 12)  # finds out which pieces there is nothing of because they cannot be read
    loader.set_state(loader.get_state() | {"step": 0})
    for batch, plain in zip(take(loader, 12), expected, strict=True):
        assert batch.video_bthwc is None
        assert batch.indices == plain.indices
        assert batch.texts.keys == tuple(text_key(caption) for caption in batch.captions)
        np.testing.assert_array_equal(batch.latents.arrays["mean"], plain.video_bthwc.mean((2, 3, 4)))
        assert [key.tobytes().decode() for key in batch.texts.arrays["key"]] == list(batch.texts.keys)


def test_closing_ends_all_threads(loading):
    before = threading.active_count()
    loader = loading()
    next(loader)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_a_config_opens_a_loader(folder, loading):
    data = DataOptions(str(folder / "data.csv"), ("48px",), ("16:9", "1:1"), (5, 9), workers=2)
    loader = open_loader(data, BUCKETS, 2, 0, 1, 2, progress=False)
    assert digests(take(loader, 3)) == digests(take(loading(rows=2, process_index=1, process_count=2), 3))
    loader.close()
