"""The mesh's grammar and its limits."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.parallel.mesh import MeshShape, make_mesh, parse_mesh

shapes = st.builds(MeshShape, data=st.integers(1, 64), seq=st.integers(1, 64))


@given(shapes)
def test_text_round_trip(shape):
    assert parse_mesh(str(shape)) == shape


def test_axes_left_out_have_size_one():
    assert parse_mesh("seq=4") == MeshShape(data=1, seq=4)
    assert parse_mesh("") == MeshShape()


@pytest.mark.parametrize("text", ["seq", "seq=0", "seq=-1", "seq=two", "rows=2", "seq=2,seq=2", "seq=1.5", "=3"])
def test_refused(text):
    with pytest.raises(OsjaxError, match="mesh"):
        parse_mesh(text)


def test_mesh_over_the_first_devices():
    mesh = make_mesh(MeshShape(data=2, seq=3))
    assert dict(mesh.shape) == {"data": 2, "seq": 3}
    assert list(mesh.devices.flat) == jax.devices()[:6]


def test_too_few_devices():
    with pytest.raises(OsjaxError, match="needs 27 devices"):
        make_mesh(MeshShape(data=9, seq=3))
