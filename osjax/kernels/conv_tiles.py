"""Tiles of the 3D convolution for Hopper GPUs (`conv_sm90.py`): which sizes there may be, and the measured best."""

from __future__ import annotations

import dataclasses

from osjax.errors import OsjaxError
from osjax.kernels.hopper import SHARED_BYTES

ROWS = 64  # pixels of one product: the rows of a wgmma instruction
CONSUMERS = 2
PANEL = 64  # channels of a shared-memory panel: 128 bytes of a 16-bit type, the widest swizzle
OTHER_SHARED_BYTES = 1024  # barriers
TILE_REGISTERS = 192  # the most that sums may take of a consumer's


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A tile: `frames` × a box of `height` · `width` pixels × `columns` output channels; and the sizes of the rings.

    A box of 64 pixels is shared by the consumers frame by frame, one of 128 half and half. Checks itself: raises
    OsjaxError for sizes that wgmma cannot multiply or that a Hopper multiprocessor cannot hold.
    """

    frames: int
    height: int
    width: int
    columns: int
    frame_slots: int
    weight_slots: int

    def __post_init__(self) -> None:
        if self.pixels not in (ROWS, 2 * ROWS) or self.height % self.halves or self.frames * self.halves % CONSUMERS:
            raise OsjaxError(
                f"{self} cannot be shared by two: take 64 pixels and even frames, or 128 and an even height"
            )
        if self.columns not in (64, 128, 256):
            raise OsjaxError(f"{self} has columns that wgmma does not know: take 64, 128 or 256")
        # When the first products of a step are issued, the last of the step before are still running, on their frames.
        if self.frame_slots < 2 * self.frames or self.weight_slots < 2:
            raise OsjaxError(
                f"{self} would wait for itself: take {2 * self.frames} frame slots or more, and 2 for weights"
            )
        if self.shared_bytes > SHARED_BYTES or self.tile_registers > TILE_REGISTERS:
            raise OsjaxError(
                f"{self} needs {self.shared_bytes} bytes of shared memory and {self.tile_registers} registers: "
                f"take fewer slots, frames or columns, {SHARED_BYTES} and {TILE_REGISTERS} are the most"
            )

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def halves(self) -> int:
        """Into how many parts of 64 pixels the box is cut."""
        return self.pixels // ROWS

    @property
    def own_frames(self) -> int:
        """Frames of one consumer."""
        return self.frames * self.halves // CONSUMERS

    @property
    def panels(self) -> int:
        return self.columns // PANEL

    @property
    def shared_bytes(self) -> int:
        rings = PANEL * (self.frame_slots * self.pixels + self.weight_slots * self.columns)
        out_and_bias = CONSUMERS * (ROWS + 2) * self.columns  # the bias is float32
        return 2 * (rings + out_and_bias) + OTHER_SHARED_BYTES

    @property
    def tile_registers(self) -> int:
        """Per thread of a consumer: float32 sums, 64 rows over 128 threads."""
        return self.own_frames * self.columns // 2


def default_tiles(frames: int, channels: int) -> Tiles:
    """The measured best for so many output frames and channels (docs/performance.md, section Convolutions)."""
    if channels <= 64:
        return Tiles(min(frames, 3), 8, 16, 64, frame_slots=8, weight_slots=8)
    return Tiles(2 if frames <= 2 else 4, 8, 8, 128, frame_slots=12, weight_slots=6)
