"""A stream of pure batches: order, resuming, errors, the thread."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.training.streams import Indexed


def take(stream, count):
    return [next(stream) for _ in range(count)]


@pytest.fixture
def squares():
    stream = Indexed(lambda step: step * step, prefetch=3)
    yield stream
    stream.close()


def test_batches_come_in_order(squares):
    assert take(squares, 5) == [0, 1, 4, 9, 16]


@given(before=st.integers(0, 6), between=st.integers(0, 6), prefetch=st.integers(1, 4))
def test_after_set_state_the_same_batches_follow(before, between, prefetch):
    stream, other = (Indexed(str, prefetch=prefetch) for _ in range(2))
    take(stream, before)
    state = stream.get_state()
    expected = take(stream, 3)
    take(stream, between)
    stream.set_state(state)
    other.set_state(state)
    assert take(stream, 3) == take(other, 3) == expected == [str(before + i) for i in range(3)]
    stream.close()
    other.close()


def test_the_state_does_not_count_what_was_only_made_ahead():
    made = []
    stream = Indexed(made.append, prefetch=4)
    next(stream)
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1, 2, 3, 4]
    assert stream.get_state() == {"step": 1}
    stream.close()


def test_batches_are_made_in_another_thread():
    stream = Indexed(lambda step: threading.current_thread().name)
    assert threading.current_thread().name != next(stream)
    stream.close()


def test_an_error_comes_with_its_batch_and_comes_again():
    broken = {2}

    def make(step):
        if step in broken:
            raise OsjaxError(f"batch {step} is broken: mend it")
        return step

    stream = Indexed(make, prefetch=3)
    assert take(stream, 2) == [0, 1]
    for _ in range(2):
        with pytest.raises(OsjaxError, match="batch 2 is broken"):
            next(stream)
        assert stream.get_state() == {"step": 2}
    broken.clear()
    assert take(stream, 2) == [2, 3]
    stream.close()


def test_close_ends_the_thread():
    before = threading.active_count()
    stream = Indexed(lambda step: step)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        next(stream)


@pytest.mark.parametrize("state", [{}, {"step": "3"}, {"step": -1}, {"file": 1}])
def test_the_state_of_something_else_is_refused(squares, state):
    with pytest.raises(OsjaxError, match="is no state of this stream: resume with the data"):
        squares.set_state(state)


def test_nothing_ahead_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="at least one"):
        Indexed(str, prefetch=0)
