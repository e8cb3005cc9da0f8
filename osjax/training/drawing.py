"""Scenes to pixels: where everything is, computed on the host in float64, then drawn on the device.

B clips, N things a clip (always two, an absent one has radius 0), T frames, H rows, W columns. Pixel centres lie at
halves; x grows to the right, y down.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from osjax.media import to_model, to_uint8
from osjax.training.shapes import BACKGROUNDS, COLORS, GAP, MOMENTS, SECONDS, Scene, check_length, trajectory

MOST_THINGS = 2
# Every shape is a star: tips on the circle of its radius, between them inner corners at this part of the radius. The
# inner corners of a regular polygon lie in the middle of its sides; a circle has more tips than can be seen.
TIPS = {"circle": 64, "square": 4, "triangle": 3, "star": 5}
INNER = {shape: float(np.cos(np.pi / tips)) for shape, tips in TIPS.items()} | {"star": 0.42}
_UPRIGHT = {"square": np.pi / 4}  # turned to stand on a side; the others have a tip above


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracks:
    """Clips ready to draw, float32. All but the last axes of each field may be preceded by a batch axis B.

    centre: [N, T, 2], x and y in pixels; radius: [N, T] in pixels; angle: [N, T] in radians, clockwise as seen; tips,
    inner: [N], see TIPS and INNER; rgb: [N, 3] and background: [3], in [-1, 1].
    """

    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    tips: np.ndarray
    inner: np.ndarray
    rgb: np.ndarray
    background: np.ndarray


def tracks(scene: Scene, height: int, width: int, num_frames: int = 33, fps: float = 24) -> Tracks:
    """Where a scene's things are in every frame of one clip. Raises OsjaxError for a clip longer than the scene."""
    check_length(num_frames, fps)
    progress = np.arange(num_frames) / (fps * SECONDS)
    side, long_axis = min(height, width), int(height > width)
    along = _stages(scene, max(height, width) / side - 1, long_axis)
    centre = np.zeros((MOST_THINGS, num_frames, 2))
    radius, angle = np.zeros((2, MOST_THINGS, num_frames))
    tips, inner, rgb = np.ones(MOST_THINGS), np.zeros(MOST_THINGS), np.zeros((MOST_THINGS, 3))
    for i, thing in enumerate(scene.things):
        centre[i], radius[i], angle[i] = trajectory(thing, scene.score, progress)
        centre[i, :, long_axis] += along[i]
        angle[i] += _UPRIGHT.get(thing.shape, 0.0)
        tips[i], inner[i] = TIPS[thing.shape], INNER[thing.shape]
        rgb[i] = to_model(np.array(COLORS[thing.color]))
    fields = (side * centre, side * radius, angle, tips, inner, rgb, to_model(np.array(BACKGROUNDS[scene.background])))
    return Tracks(*(field.astype(np.float32) for field in fields))


def _stages(scene: Scene, room: float, axis: int) -> list[float]:
    """Where along the longer side of a frame, `axis` 0 or 1 of x and y, each thing's stage begins. room: what that side
    is longer than a stage; both in sides of the stage.

    Where two stages fit side by side, each of two things has its own, so that all of a long frame is used; not where
    they would come too close, because they pass each other.
    """
    together = [scene.stage * room] * len(scene.things)
    if len(scene.things) < 2 or room < 1:
        return together
    (a, radius_a, _), (b, radius_b, _) = (trajectory(thing, scene.score, MOMENTS) for thing in scene.things)
    slack = room - 1
    begins = [slack * scene.stage / 2, 1 + slack * (1 + scene.stage) / 2]
    apart = begins if a[:, axis].mean() <= b[:, axis].mean() else begins[::-1]
    way = a - b
    way[:, axis] += apart[0] - apart[1]
    return apart if (np.linalg.norm(way, axis=1) - radius_a - radius_b).min() > GAP else together


def stack(clips: Sequence[Tracks]) -> Tracks:
    """Clips of equal length as one batch: every field gains a first axis B."""
    return jax.tree.map(lambda *fields: np.stack(fields), *clips)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def draw(batch: Tracks, height: int, width: int) -> jax.Array:
    """Draws a batch: float32 [B, T, H, W, 3] in [-1, 1], edges one pixel wide; later things over earlier ones."""
    y_h1, x_1w = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None, :] + 0.5
    frames = batch.radius.shape[-1]
    image_bthwc = jnp.broadcast_to(batch.background[:, None, None, None], (len(batch.rgb), frames, height, width, 3))
    for n in range(MOST_THINGS):
        dx_bthw = x_1w - batch.centre[:, n, :, 0, None, None]
        dy_bthw = y_h1 - batch.centre[:, n, :, 1, None, None]
        radius_bt11, angle_bt11 = (field[:, n, :, None, None] for field in (batch.radius, batch.angle))
        tips_b111, inner_b111 = (field[:, n, None, None, None] for field in (batch.tips, batch.inner))
        distance_bthw = star_distance(dx_bthw, dy_bthw, radius_bt11, angle_bt11, tips_b111, inner_b111)
        cover_bthw1 = (jnp.clip(0.5 - distance_bthw, 0, 1) * (radius_bt11 > 0))[..., None]
        image_bthwc = image_bthwc + cover_bthw1 * (batch.rgb[:, n, None, None, None] - image_bthwc)
    return image_bthwc


def star_distance(
    x: jax.Array, y: jax.Array, radius: jax.Array, angle: jax.Array, tips: jax.Array, inner: jax.Array
) -> jax.Array:
    """Signed distance of points from a star's edge in their own unit, negative inside; arguments broadcast.

    x, y: from its centre, y down; angle: that its first tip is turned clockwise from straight above; inner: part of the
    radius at which its inner corners lie. Folding a point into half a sector leaves one edge to measure, from the tip
    (1, 0) to the inner corner; beyond an edge's end the distance is to the line that continues it.
    """
    half_sector = jnp.pi / tips
    around = jnp.arctan2(x, -y) - angle
    folded = jnp.abs((around + half_sector) % (2 * half_sector) - half_sector)
    from_centre = jnp.hypot(x, y)
    corner_x, corner_y = inner * jnp.cos(half_sector), inner * jnp.sin(half_sector)
    normal_x, normal_y = corner_y, 1 - corner_x
    length = jnp.hypot(normal_x, normal_y)
    along = from_centre * (jnp.cos(folded) * normal_x + jnp.sin(folded) * normal_y)
    return (along - radius * normal_x) / length


def draw_clip(scene: Scene, height: int, width: int, num_frames: int = 33, fps: float = 24) -> np.ndarray:
    """One clip as uint8 [T, H, W, 3]. Raises OsjaxError for a clip longer than the scene."""
    batch = stack([tracks(scene, height, width, num_frames, fps)])
    return np.asarray(to_uint8(draw(batch, height, width)[0]))
