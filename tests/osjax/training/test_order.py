"""The order of clips: a function of the batch's number in which every clip has its turn."""

import collections
import itertools
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.training.order import Order, Place

ORDERS = st.builds(
    Order,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)


def shown(order, steps):
    """(bucket, clip) of every row of those batches."""
    places = [place for step in steps for place in order.batch(step)]
    return [(place.bucket, next(order.clips(place))) for place in places]


@given(order=ORDERS, step=st.integers(0, 10**6))
def test_a_batch_is_of_one_bucket_and_of_its_size(order, step):
    places = order.batch(step)
    assert len(places) == order.batch_size
    assert len({place.bucket for place in places}) == 1
    assert all(0 <= place.place < order.sizes[place.bucket] for place in places)


@given(order=ORDERS, count=st.integers(1, 60))
def test_each_bucket_goes_through_its_clips_in_cycles(order, count):
    """Its own places follow each other without a gap, whatever lies between, and a cycle shows each clip once."""
    places = [place for step in range(count) for place in order.batch(step)]
    for bucket, size in enumerate(order.sizes):
        own = [place for place in places if place.bucket == bucket]
        assert own == [Place(bucket, *divmod(number, size)) for number in range(len(own))]
        clips = [next(order.clips(place)) for place in own]
        for start in range(0, len(clips) - size + 1, size):
            assert sorted(clips[start : start + size]) == list(range(size))


@given(order=ORDERS)
@settings(max_examples=30)
def test_in_batch_size_epochs_every_clip_is_shown_as_often(order):
    """After so many epochs every bucket's clips fill whole batches, so that nothing is left over."""
    counts = collections.Counter(shown(order, range(sum(order.sizes))))
    expected = {(bucket, clip): order.batch_size for bucket, size in enumerate(order.sizes) for clip in range(size)}
    assert counts == expected


@given(order=ORDERS, step=st.integers(0, 1000))
def test_what_stands_in_are_the_other_clips_of_the_bucket(order, step):
    for place in order.batch(step):
        candidates = list(order.clips(place))
        assert sorted(candidates) == list(range(order.sizes[place.bucket]))
    following = order.batch(step)
    for place, after in itertools.pairwise(following):
        if place.cycle == after.cycle:
            assert list(order.clips(place))[1 % order.sizes[place.bucket]] == next(order.clips(after))


def test_seeds_cycles_and_buckets_are_shuffled_apart():
    def cycle(seed, bucket, number):
        order = Order((30, 30), 30, seed)
        return tuple(order.clips(Place(bucket, number, 0)))

    assert len({cycle(seed, bucket, number) for seed in (0, 1) for bucket in (0, 1) for number in (0, 1)}) == 8
    assert cycle(0, 0, 0) == cycle(0, 0, 0) != tuple(range(30))


def test_buckets_take_turns_in_a_shuffled_order_by_their_shares():
    order = Order((30, 10), 2, 0)
    first = [order.batch(step)[0].bucket for step in range(20)]
    assert collections.Counter(first) == {0: 15, 1: 5}
    assert first != sorted(first)
    assert first != [order.batch(step)[0].bucket for step in range(20, 40)]


def test_another_process_has_the_same_order():
    code = "from osjax.training.order import Order; print(Order((7, 3), 4, 5).batch(123456789))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Order((7, 3), 4, 5).batch(123456789))
