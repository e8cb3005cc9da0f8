"""What devices have, what would help, and how it is said."""

import types

import jax
import jax.numpy as jnp
import pytest

from osjax import room
from osjax.errors import OsjaxError
from osjax.parallel.mesh import MeshShape
from osjax.preflight import Setting, estimate
from osjax.request import Request
from tests.osjax.test_preflight import PUBLISHED


def device(**stats):
    return types.SimpleNamespace(memory_stats=lambda: stats or None)


def given(count=1, offload=False, in_blocks=False, **options):
    requests = (Request("a", **options),) * count
    return estimate(PUBLISHED, Setting(requests, MeshShape(), jnp.bfloat16, offload, "cudnn", in_blocks=in_blocks))


def test_the_least_that_every_device_has():
    first, second = device(bytes_limit=80e9, bytes_in_use=1e9), device(bytes_limit=60e9, bytes_in_use=0)
    assert room.memory(first) == room.Memory(79, 80)
    assert room.least([first, second]) == room.Memory(60, 60)
    assert room.least([first, device()]) is None
    assert room.least(jax.devices("cpu")) is None


@pytest.mark.parametrize(
    ("memory", "devices", "options", "helps"),
    [
        (40, 1, {}, "--offload True needs 25 GB"),
        (34, 1, {"resolution": "768px", "offload": True, "count": 2}, "--offload_blocks True needs 1"),
        (29, 8, {"resolution": "768px", "offload": True}, "--offload_blocks True needs 12.6 GB"),
        (24, 1, {}, "--offload True needs 10.3 GB"),
        (16, 1, {"resolution": "768px"}, "--offload True needs 12.6 GB"),
        (
            12,
            8,
            {"resolution": "768px", "offload": True, "in_blocks": True, "count": 2},
            "--resolution 256px needs 10.4 GB",
        ),
        (12, 1, {"resolution": "768px"}, "--offload True --resolution 256px needs 10.3 GB"),
        (10, 1, {}, "no option of osjax generate makes it fit"),
        (80, 1, {}, "--offload True needs 25 GB"),  # it ought to fit: other programs may be there
        (None, 1, {}, "whose memory is not known: --offload True needs 25 GB"),
    ],
)
def test_the_first_option_that_helps(memory, devices, options, helps):
    line = room.shortage(PUBLISHED, given(**options), memory, devices)
    assert helps in line
    assert "GB on each device" in line
    assert "\n" not in line


def test_remedies_need_less_and_go_with_the_request():
    told = given(cond_type="v2v_head", refs=("a.mp4",), offload=True)
    options = [words for words, _ in room.remedies(PUBLISHED, told, None, 1)]
    frames = ["--num_frames 65", "--num_frames 33"]  # fewer than the reference gives cannot be drawn
    blocks = "--offload_blocks True"
    plain = [blocks, room.IN_8_BITS, *frames]
    offloaded = [room.IN_8_BITS, *frames]
    assert options[: len(plain)] == plain
    assert set(options[len(plain) :]) >= {f"{blocks} {each}" for each in offloaded}
    assert all(other.peak.total < told.peak.total for _, other in room.remedies(PUBLISHED, told, None, 1))


@pytest.mark.parametrize(
    ("memory", "verdict"),
    [(80, "43.1 GB of 80 GB: it fits"), (40, "it does not fit: decode (VAE) needs 43.1 GB"), (None, "is not known")],
)
def test_the_text(memory, verdict):
    text = room.describe(PUBLISHED, given(), memory, 1)
    for part in ("336 x 192 pixels, 129 frames", "8316 image tokens, 512 text tokens", "80 forward passes", verdict):
        assert part in text
    assert "mmdit 23.8 (11,891.4 M parameters)" in text
    assert "of them in full" not in text
    assert "80 forward passes for each video, 18 of them in full\n" in room.describe(
        PUBLISHED, given(speed="fast"), 80, 1
    )


def test_a_full_device_says_what_helps():
    with pytest.raises(OsjaxError, match="memory is full: buy more"), room.explaining_memory(lambda: "buy more"):
        jax.block_until_ready(jnp.zeros((1 << 45,)))
