"""What memory the devices have, whether an estimate fits into it, what would help if not, and the words for all that.

GB are 1e9 bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from osjax.bundle import Bundle
from osjax.errors import OsjaxError, is_out_of_memory
from osjax.models.quantized import FULL
from osjax.preflight import GB, Estimate, Setting, denoising, estimate
from osjax.request import Request

_PRECISION = "fp8"  # int8, for older GPUs, weighs as much
IN_8_BITS = f"--precision {_PRECISION}"


@dataclasses.dataclass(frozen=True)
class Memory:
    """GB of one device that this program can have (total), and of them what it does not use yet (free)."""

    free: float
    total: float


@contextlib.contextmanager
def explaining_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turns a device that runs out of memory into an OsjaxError; advice: says what is needed, and what helps."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OsjaxError(f"the device's memory is full: {advice()}") from error


def memory(device: jax.Device) -> Memory | None:
    """Of a device; None if it does not tell, as CPUs do not."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    total = stats["bytes_limit"]
    return Memory((total - stats.get("bytes_in_use", 0)) / GB, total / GB)


def least(devices: Sequence[jax.Device]) -> Memory | None:
    """The least that each of them has; None if one does not tell."""
    found = [memory(device) for device in devices]
    if not found or None in found:
        return None
    return Memory(min(each.free for each in found), min(each.total for each in found))


def describe(bundle: Bundle, given: Estimate, room: float | None, devices: int) -> str:
    """The estimate as lines of text, and whether it fits into `room` GB on each device (None: not known).

    devices: how many there are in all, to tell what would help.
    """
    setting, grid = given.setting, given.grid
    in_blocks = ", the transformer block by block" if setting.in_blocks else ""
    in_full = "" if given.in_full == given.passes else f", {given.in_full} of them in full"
    height, width = given.size
    weights = ", ".join(
        f"{name} {gigabytes(each)} ({given.parameters[name] / 1e6:,.1f} M parameters)"
        for name, each in given.weights.items()
    )
    lines = [
        f"{width} x {height} pixels, {given.frames} frames, {len(setting.requests)} at once",
        f"latents {grid.t} x {grid.h} x {grid.w}: {grid.tokens} image tokens, {given.text_tokens} text tokens",
        f"{given.passes} forward passes for each video{in_full}",
        f"weights, GB: {weights}",
        f"on each device of {setting.mesh}, attention {setting.attention}{in_blocks}, GB:",
        f"  {'stage':24} {'weights':>8} {'the rest':>9} {'together':>9}",
    ]
    for stage in given.stages:
        columns = map(gigabytes, (stage.weights, stage.activations, stage.total))
        lines.append("  {:24} {:>8} {:>9} {:>9}".format(stage.name, *columns))
    fits = given.fits(room)
    if fits is None:
        lines.append(f"at most {gigabytes(given.peak.total)} GB; what the device has is not known")
    elif fits:
        lines.append(f"at most {gigabytes(given.peak.total)} GB of {gigabytes(room)} GB: it fits")
    else:
        lines.append(f"it does not fit: {shortage(bundle, given, room, devices)}")
    return "\n".join(lines)


def shortage(bundle: Bundle, given: Estimate, room: float | None, devices: int) -> str:
    """One line: what is needed on each device, what there is, and the first option that would help.

    Where the estimate fits into `room`, or that is not known, the first option that needs less.
    """
    needed = f"{given.peak.name} needs {gigabytes(given.peak.total)} GB on each device"
    there = "whose memory is not known" if room is None else f"of {gigabytes(room)} GB"
    short = given.fits(room) is False
    for words, other in remedies(bundle, given, room, devices):
        if not short or other.fits(room):
            return f"{needed} {there}: {words} needs {gigabytes(other.peak.total)} GB"
    return f"{needed} {there}: no option of osjax generate makes it fit; take a device with more memory"


def gigabytes(value: float) -> str:
    """Three digits of it, as many as an estimate is worth."""
    return f"{value:.3g}"


def remedies(bundle: Bundle, given: Estimate, room: float | None, devices: int) -> Iterator[tuple[str, Estimate]]:
    """What needs less than `given`, as it is written on the command line, with what is needed then.

    Each option by itself, the mildest first, then each with (more) offloading, last of all those that make videos
    smaller with all that saves memory otherwise; room: GB of each device, where they tell; devices: how many there are
    in all.
    """
    plain = given.setting
    bases = [("", plain), *_offloaded(bundle, plain, room)]
    for place, (prefix, base) in enumerate(bases):
        for more, offloaded in bases[place + 1 :]:
            yield from _lesser(bundle, given, more.strip(), offloaded)
        for words, setting in (*_harmless(base, devices), *_in_8_bits(base), *_reduced(base)):
            yield from _lesser(bundle, given, prefix + words, setting)
    prefix, base = bases[-1]
    for rounding, small in _in_8_bits(base):
        for words, setting in _reduced(small):
            yield from _lesser(bundle, given, f"{prefix}{rounding} {words}", setting)


def _lesser(bundle: Bundle, given: Estimate, words: str, setting: Setting) -> Iterator[tuple[str, Estimate]]:
    try:
        found = estimate(bundle, setting)
    except OsjaxError:  # a length or a size that these references or this model do not go with
        return
    if found.peak.total < given.peak.total:
        yield words, found


def _offloaded(bundle: Bundle, setting: Setting, room: float | None) -> Iterator[tuple[str, Setting]]:
    """The setting with offloading, or if it has that with the transformer's blocks one by one, if it has not."""
    in_blocks = dataclasses.replace(setting, offload=True, beside=(), in_blocks=True)
    if not setting.offload:
        as_a_whole = dataclasses.replace(in_blocks, in_blocks=False)
        # Which of them this option is, the pipeline decides in the same way.
        whole_fits = room is None or denoising(bundle, as_a_whole).total <= room
        yield "--offload True ", as_a_whole if whole_fits else in_blocks
    elif not setting.in_blocks:
        yield "--offload_blocks True ", in_blocks


def _in_8_bits(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """The change that is approximate, if it is one."""
    if setting.precision == FULL:
        yield IN_8_BITS, dataclasses.replace(setting, precision=_PRECISION)


def _harmless(setting: Setting, devices: int) -> Iterator[tuple[str, Setting]]:
    """Changes that leave each video as it is."""
    batch, mesh = len(setting.requests) // 2, setting.mesh
    while batch:
        yield f"--batch_size {batch}", dataclasses.replace(setting, requests=setting.requests[:batch])
        batch //= 2
    while (mesh := dataclasses.replace(mesh, seq=2 * mesh.seq)).devices <= devices:
        yield f"--mesh {mesh}", dataclasses.replace(setting, mesh=mesh)


def _reduced(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """The same videos in fewer pixels or frames."""
    first = setting.requests[0]
    if first.resolution == "768px":
        yield "--resolution 256px", _asking(setting, lambda request: {"resolution": "256px"})
    frames = first.num_frames
    while (frames := frames // 8 * 4 + frames % 4) > 1:
        yield f"--num_frames {frames}", _asking(setting, lambda request, frames=frames: {"num_frames": frames})


def _asking(setting: Setting, options: Callable[[Request], Mapping[str, Any]]) -> Setting:
    requests = tuple(dataclasses.replace(request, **options(request)) for request in setting.requests)
    return dataclasses.replace(setting, requests=requests)
