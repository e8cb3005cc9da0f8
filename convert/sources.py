"""Reading checkpoints tensor by tensor: safetensors files, PyTorch pickles, and shards of either behind an index.

Nothing stays mapped: reading a checkpoint of any size keeps one tensor in memory, however mapped pages are counted.
This is the only file that imports PyTorch, and only when a pickle is opened. Pickles are read with weights-only
loading, which runs no code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from convert.layout import INDEX, PICKLES, SAFETENSORS
from osjax.errors import OsjaxError

_HEADER_LIMIT = 100_000_000  # bytes; the same as the format's own reader
_REOPEN_AFTER = 128 << 20  # bytes read from a mapped pickle before its pages are given back
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPE_NAMES = {str(np.dtype(dtype)): np.dtype(dtype) for dtype in _DTYPES.values()}


class Source(Protocol):
    """A checkpoint: `files` it consists of, `shapes` of its tensors (known without reading them), `read` for one."""

    files: tuple[Path, ...]
    shapes: Mapping[str, jax.ShapeDtypeStruct]

    def read(self, name: str) -> np.ndarray:
        """The tensor in the file's own shape and dtype, in memory of its own. Raises OsjaxError."""
        ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens `*.safetensors`, a pickle (`.pt`, `.pth`, `.bin`, `.ckpt`) or an index of shards (`*.index.json`).

    Raises OsjaxError if the file is absent, truncated, garbled, of another kind, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise OsjaxError(f"checkpoint {path} is missing: check the path, or download it")
    if path.name.endswith(INDEX):
        return ShardedSource(path)
    if path.suffix == SAFETENSORS:
        return SafetensorsSource(path)
    if path.suffix in PICKLES:
        return PickleSource(path)
    raise OsjaxError(f"{path} is no checkpoint: give a file in {SAFETENSORS}, {', '.join(PICKLES)} or an *{INDEX}")


class SafetensorsSource:
    """One safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps."""

    def __init__(self, path: Path):
        self.files = (path,)
        with reading(path), path.open("rb") as file:
            header, self._start = _read_header(path, file)
        self._spans: dict[str, tuple[int, int]] = {}
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for name, entry in header.items():
            shape, dtype, self._spans[name] = _parse_entry(path, name, entry)
            self.shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
        self._check_spans(path)

    def read(self, name: str) -> np.ndarray:
        begin, end = self._spans[name]
        shape = self.shapes[name]
        data = np.empty(end - begin, np.uint8)
        with reading(self.files[0]), self.files[0].open("rb") as file:
            file.seek(self._start + begin)
            if file.readinto(data) != data.size:
                raise _damaged(self.files[0], "it became shorter while it was read")
        return data.view(shape.dtype).reshape(shape.shape)

    def _check_spans(self, path: Path) -> None:
        expected = 0
        for begin, end in sorted(self._spans.values()):
            if begin != expected:
                raise _damaged(path, "its tensors overlap or leave gaps")
            expected = end
        size = path.stat().st_size
        if size != self._start + expected:
            raise _damaged(path, f"{size} bytes instead of {self._start + expected}")


class PickleSource:
    """One file of `torch.save`: a state dict, bare or under `state_dict`, `model` or `module`.

    Files of PyTorch 1.6 and later are mapped, and remapped now and then so that the pages read do not pile up; older
    ones can only be read whole.
    """

    def __init__(self, path: Path):
        self.files = (path,)
        self._tensors: dict[str, Any] = {}
        self._bytes_read = 0
        self._load()
        self.shapes = {
            name: jax.ShapeDtypeStruct(tuple(tensor.shape), _numpy_dtype(path, tensor))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        import torch

        if self._bytes_read > _REOPEN_AFTER and zipfile.is_zipfile(self.files[0]):
            self._load()
        shape = self.shapes[name]
        data = self._tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
        self._bytes_read += data.nbytes
        return data.view(shape.dtype).reshape(shape.shape)

    def _load(self) -> None:
        path = self.files[0]
        try:
            import torch
        except ImportError as error:
            raise OsjaxError(f"reading {path} needs PyTorch: pip install osjax[torch], or use .safetensors") from error
        self._tensors = {}  # gives the old mapping back first
        self._bytes_read = 0
        with reading(path):
            mapped = zipfile.is_zipfile(path)
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except OSError:
                raise
            except Exception as error:  # a garbled pickle raises nearly anything
                raise OsjaxError(
                    f"{path} is refused, being damaged or holding Python objects, which are never run: "
                    "download it again, or get it as .safetensors"
                ) from error
        self._tensors = _state_dict(path, loaded)


class ShardedSource:
    """Several files behind an `*.index.json` whose `weight_map` says which file holds which tensor."""

    def __init__(self, path: Path):
        try:
            with reading(path):
                weight_map = json.loads(path.read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
            if not names or any(not name or Path(name).name != name for name in names):
                raise ValueError("weight_map must name files of its own folder")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(path, f"no usable weight_map: {error}") from error
        absent = [name for name in names if not (path.parent / name).is_file()]
        if absent:
            raise OsjaxError(f"{path} names files that are missing ({', '.join(absent)}): download them")
        shards = {name: open_source(path.parent / name) for name in names}
        lost = [f"{tensor} of {file}" for tensor, file in weight_map.items() if tensor not in shards[file].shapes]
        if lost:
            raise _damaged(path, f"shards without tensors it names: {', '.join(lost)}")
        self.files = (path, *(path.parent / name for name in names))
        self._shard_of = {tensor: shards[file] for tensor, file in weight_map.items()}
        self.shapes = {tensor: shard.shapes[tensor] for tensor, shard in self._shard_of.items()}

    def read(self, name: str) -> np.ndarray:
        return self._shard_of[name].read(name)


def _read_header(path: Path, file: Any) -> tuple[dict[str, Any], int]:
    """The header without its metadata, and where the tensors start."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= min(_HEADER_LIMIT, path.stat().st_size - 8):
        raise _damaged(path, "no safetensors header")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no table")
    header.pop("__metadata__", None)
    return header, 8 + length


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
    """Shape, dtype and bytes [begin, end) of one tensor of a safetensors header."""
    try:
        shape, (begin, end), code = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
        numbers = (*shape, begin, end)
        if any(not isinstance(number, int) or number < 0 for number in numbers) or end < begin:
            raise ValueError("negative sizes")
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"its header says nothing usable about {name}") from error
    if code not in _DTYPES:
        raise OsjaxError(f"{path} holds {name} as {code}, which is not supported: get it as BF16, F16 or F32")
    dtype = np.dtype(_DTYPES[code])
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _damaged(path, f"shape and bytes of {name} differ")
    return shape, dtype, (begin, end)


def _state_dict(path: Path, loaded: Any) -> dict[str, Any]:
    """The tensors by name, taken out of the wrappings that training scripts put around them."""
    import torch

    for key in ("state_dict", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise OsjaxError(f"{path} holds no state dict: save model.state_dict() alone")
    odd = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise OsjaxError(f"{path} holds entries that are no tensors ({', '.join(odd)}): save model.state_dict() alone")
    wrapped = all(name.startswith("module.") for name in loaded)  # DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in loaded.items()}


def _numpy_dtype(path: Path, tensor: Any) -> np.dtype:
    """numpy's dtype of a dense torch tensor; both libraries and ml_dtypes use the same names."""
    name = str(tensor.dtype).removeprefix("torch.") if str(tensor.layout) == "torch.strided" else "sparse"
    if name not in _DTYPE_NAMES:
        raise OsjaxError(f"{path} holds {name} tensors, which are not supported: save them dense in float32")
    return _DTYPE_NAMES[name]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into an OsjaxError."""
    try:
        yield
    except OSError as error:
        raise OsjaxError(f"cannot read {path} ({error.strerror or error}): check the disk and permissions") from error


def _damaged(path: Path, why: str) -> OsjaxError:
    return OsjaxError(f"{path} is damaged ({why}): download it again")
