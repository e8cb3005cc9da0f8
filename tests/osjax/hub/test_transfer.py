"""However a connection breaks, the file is exact or its part is a true beginning."""

import contextlib
import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.hub import transfer
from osjax.hub.source import RemoteFile

CONTENT = bytes(range(256)) * 4
FILE = RemoteFile("a/b", "main", "sub/x.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())

# What an answer does: how many bytes it sends, whether it skips to where it is asked to, whether it fails or just ends.
ANSWERS = st.lists(st.tuples(st.integers(0, len(CONTENT)), st.booleans(), st.booleans()), max_size=8)


def opener(answers):
    """A server that gives these answers, then whole files."""
    rest = iter(answers)

    @contextlib.contextmanager
    def open_at(start):
        count, skips, fails = next(rest, (len(CONTENT), True, False))
        offset = start if skips else 0

        def chunks():
            sent = CONTENT[offset : offset + count]
            yield from (sent[i : i + 100] for i in range(0, len(sent), 100))
            if fails:
                raise transfer.BrokenConnectionError("broken")

        yield offset, chunks()

    return open_at


@given(answers=ANSWERS, held=st.integers(0, len(CONTENT)), tries=st.integers(0, 3))
def test_exact_or_a_true_beginning(answers, held, tries):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = transfer.part_of(FILE, folder)
        part.parent.mkdir()
        part.write_bytes(CONTENT[:held])
        with contextlib.suppress(OsjaxError):
            transfer.receive(FILE, folder, opener(answers), [0.0] * tries)
        if part.exists():
            assert CONTENT.startswith(part.read_bytes())
            assert transfer.held(FILE, folder) == part.stat().st_size
        if not (folder / FILE.path).exists():
            transfer.receive(FILE, folder, opener([]))
        assert [path.name for path in part.parent.iterdir()] == ["x.bin"]
        assert (folder / FILE.path).read_bytes() == CONTENT


def test_nothing_is_asked_of_a_server_for_a_part_that_is_complete(tmp_path):
    part = transfer.part_of(FILE, tmp_path)
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    transfer.receive(FILE, tmp_path, opener=None)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT


def test_an_endless_answer_is_cut_off(tmp_path):
    @contextlib.contextmanager
    def endless(start):
        yield start, iter(lambda: b"x" * 100, None)

    with pytest.raises(OsjaxError, match="did not come as a/b lists it"):
        transfer.receive(FILE, tmp_path, endless)
    assert not list((tmp_path / "sub").iterdir())
