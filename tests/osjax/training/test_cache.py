"""Cached arrays: found again exactly, never stale, never half written."""

import concurrent.futures
import logging
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from osjax.errors import OsjaxError
from osjax.training.cache import Cache, clip_key, text_key
from osjax.training.clips import BrokenClip, Cut

DTYPES = st.sampled_from((np.float32, np.float16, np.int32, np.uint8, ml_dtypes.bfloat16))


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", "vae 1")


@given(
    entry=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, max_side=4)),
        min_size=1,
        max_size=3,
    ),
    dtype=DTYPES,
    turned=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_arrays_are_found_again(tmp_path_factory, entry, dtype, turned):
    """Turned arrays lie in memory in another order than they are read in."""
    cache = Cache(tmp_path_factory.getbasetemp() / "cache", "vae")
    entry = {name: (array.T if turned else array).astype(dtype, order="K") for name, array in entry.items()}
    cache.put(text_key("a cat"), entry)
    found = cache.get(text_key("a cat"))
    assert found.keys() == entry.keys()
    for name, array in entry.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_what_was_not_put_is_not_there(cache):
    assert cache.get(text_key("a cat")) is None
    cache.put(text_key("a cat"), {"t5": np.zeros(3)})
    assert cache.get(text_key("a dog")) is None


def test_what_another_model_made_is_not_there(cache, tmp_path):
    cache.put(text_key("a cat"), {"t5": np.zeros(3)})
    assert Cache(tmp_path / "cache", "vae 2").get(text_key("a cat")) is None
    assert Cache(tmp_path / "cache", "vae 1").get(text_key("a cat")) is not None


def test_a_batch_is_whole_or_not_there(cache):
    keys = [text_key(text) for text in "abc"]
    for number, key in enumerate(keys[:2]):
        cache.put(key, {"z": np.full((2, 3), number), "head": np.full(1, number)})
    partly = cache.look_up(keys)
    assert partly.keys == tuple(keys)
    assert partly.arrays is None
    whole = cache.look_up([keys[1], keys[0], keys[1]])
    np.testing.assert_array_equal(whole.arrays["z"][:, 0, 0], [1, 0, 1])
    assert whole.arrays["head"].shape == (3, 1)


def test_a_key_changes_with_all_that_decides_the_frames(tmp_path):
    path, cut = tmp_path / "a.mp4", Cut(0, 1, 33)
    path.write_bytes(b"some frames")
    shutil.copy2(path, tmp_path / "b.mp4")
    same = clip_key(path, cut, 96, 144)
    assert same == clip_key(str(path), Cut(0, 1, 33), 96, 144)
    others = [clip_key(tmp_path / "b.mp4", cut, 96, 144), clip_key(path, Cut(33, 1, 33), 96, 144)]
    others += [clip_key(path, Cut(0, 2, 33), 96, 144), clip_key(path, cut, 144, 96)]
    os.utime(path, ns=(1, 1))
    others.append(clip_key(path, cut, 96, 144))
    path.write_bytes(b"others")
    os.utime(path, ns=(1, 1))
    others.append(clip_key(path, cut, 96, 144))
    assert len({same, *others}) == 7


def test_a_key_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    assert clip_key("a.mp4", Cut(0, 1, 1), 16, 16) == clip_key(tmp_path / "a.mp4", Cut(0, 1, 1), 16, 16)
    for missing in ("none.mp4", "nul\0.mp4", "x" * 5000):
        with pytest.raises(BrokenClip, match=f"{missing} does not exist"):
            clip_key(missing, Cut(0, 1, 1), 16, 16)


@pytest.mark.parametrize("damage", [b"", b"x", b"\xff" * 100])
def test_a_damaged_entry_is_told_and_made_anew(cache, tmp_path, caplog, damage):
    cache.put("key", {"z": np.ones(5)})
    (file,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    file.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert cache.get("key") is None
    assert str(file) in caplog.text
    cache.put("key", {"z": np.ones(5)})
    np.testing.assert_array_equal(cache.get("key")["z"], np.ones(5))


def test_many_may_write_the_same_entry(cache):
    """Hosts that share a folder meet at equal captions."""
    entries = [{"z": np.full(1000, number)} for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda entry: cache.put("key", entry), entries))
    found = cache.get("key")["z"]
    assert found.shape == (1000,)
    assert len(set(found)) == 1


def test_a_full_disk_leaves_no_entry(tmp_path):
    """The limit on file sizes makes the write fail as a full disk does."""
    code = (
        "import resource, signal, numpy as np\n"
        "from osjax.errors import OsjaxError\n"
        "from osjax.training.cache import Cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "cache = Cache('cache', 'vae')\n"
        "cache.put('small', {'z': np.zeros(10)})\n"
        "try: cache.put('large', {'z': np.zeros(10_000)})\n"
        "except OsjaxError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cannot write" in done.stdout, done.stderr
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["small.safetensors"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OsjaxError, match="cannot make the folder"):
        Cache(tmp_path / "cache", "vae").put("key", {"z": np.zeros(1)})
