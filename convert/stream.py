"""Checkpoints to a bundle, one slab of one leaf at a time.

Memory: the source tensor in hand and the one before it, the slab made of it, and a part (`osjax/checkpoint.py`) being
saved; together below three times the largest source tensor and 1 GB. A bundle is built under a temporary name beside
its final one and renamed last, so that a conversion killed at any moment leaves nothing that loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert import autoencoder_2d, clip, dc_ae, hunyuan_vae, infer, layout, mmdit, t5
from convert.rules import Plan, Slab, abstract, plan
from convert.sources import Source, open_source, reading
from osjax import leaves
from osjax.bundle import Component, write_manifest
from osjax.checkpoint import PartWriter
from osjax.errors import OsjaxError
from osjax.models.mmdit import MMDiT
from osjax.models.quantized import FULL, quantizable, rounded_kernel

TABLES: dict[str, ModuleType] = {
    "mmdit": mmdit,
    "hunyuan_vae": hunyuan_vae,
    "t5": t5,
    "clip": clip,
    "dc_ae": dc_ae,
    "flux": mmdit,  # draws the picture that a video starts from
    "autoencoder_2d": autoencoder_2d,
}

_BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Job:
    """One checkpoint, matched completely with the model it becomes.

    config: the model's; options_from: the file that it was read from, or "shapes"; dtype: of the floating leaves;
    quantized: projections that are stored in 8 bits, by `precision`.
    """

    kind: layout.Kind
    source: Source
    file: Path
    config: Any
    options_from: str
    dtype: np.dtype
    plan: Plan
    max_length: int | None
    precision: str = FULL
    quantized: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        return sum(math.prod(slab.shape) for slab in self.plan.slabs)

    @property
    def nbytes(self) -> int:
        """Of what is written."""
        return sum(_quantized_bytes(slab) if self.quantizes(slab) else slab.nbytes for slab in self.plan.slabs)

    def quantizes(self, slab: Slab) -> bool:
        """Whether a slab is stored in 8 bits."""
        projection, _, parameter = slab.leaf.rpartition(".")
        return parameter == "kernel" and projection in self.quantized


def prepare(found: layout.Found, config: Path | None = None, dtype: Any = None, precision: str = FULL) -> Job:
    """Reads the header of a checkpoint and plans its conversion; reads no tensor.

    config: file of its options, by default what lies beside it, else inferred. dtype: of the floating leaves, by
    default that of the file; precision: of the blocks of a transformer, other models are in full. Raises OsjaxError if
    it cannot be read or does not match its model.
    """
    source = open_source(found.file)
    detected = infer.detect_kind(source.shapes)
    name = found.kind or detected
    if name is None:
        raise OsjaxError(f"{found.file} is of no kind that osjax knows: check the file, or name its kind with --as")
    if detected is not None and TABLES[detected] is not TABLES[name]:
        raise OsjaxError(
            f"{found.file} holds a {detected}, not a {name}: rename it, or convert it with --as {detected}"
        )
    kind = next(each for each in layout.KINDS if each.name == name)
    path = config or layout.find_config(found.file)
    options = layout.read_options(path) if path else infer.infer_options(name, source.shapes)
    table = TABLES[name]
    settings = _read_config(table, options, path)
    dtype = np.dtype(dtype if dtype is not None else _source_dtype(source))
    module = abstract(table, settings, dtype)
    quantized = quantizable(module) if precision != FULL and isinstance(module, MMDiT) else ()
    return Job(
        kind=kind,
        source=source,
        file=found.file,
        config=module.config,
        options_from=str(path) if path else "shapes",
        dtype=dtype,
        plan=plan(table.rules(settings), source.shapes, leaves.flatten(module)),
        max_length=_max_length(kind, found.file, module.config),
        precision=precision if quantized else FULL,
        quantized=frozenset(quantized),
    )


def write_bundle(jobs: Sequence[Job], destination: Path) -> None:
    """Converts and writes all jobs as the bundle `destination`, which must not exist (an empty folder may).

    Shows progress on stderr. Raises OsjaxError if a source turns out unreadable, the disk is full, or another
    conversion writes the same bundle.
    """
    needed = sum(job.nbytes for job in jobs)
    sources = sorted({file for job in jobs for file in job.source.files})
    total = sum(job.plan.nbytes for job in jobs) + sum(file.stat().st_size for file in sources)
    with _building(destination.absolute(), needed) as folder, _progress(total) as progress:
        digests = {os.path.relpath(file, _common_folder(sources)): _digest(file, progress) for file in sources}
        components = {job.kind.component: _write_component(job, folder, progress) for job in jobs}
        write_manifest(folder, components, sources=digests, settings={})


def _read_config(table: ModuleType, options: dict[str, Any], path: Path | None) -> Any:
    try:
        return table.read_config(options)
    except (TypeError, ValueError, KeyError) as error:  # of values that are not even of the right type
        raise OsjaxError(f"unusable options in {path} ({error}): mend that file") from error


def _max_length(kind: layout.Kind, file: Path, config: Any) -> int | None:
    """Tokens that a text encoder is given, no more than it has positions for (T5's positions have no end)."""
    length = layout.max_length(kind, file)
    return length and min(length, getattr(config, "max_position_embeddings", length))


def _write_component(job: Job, bundle: Path, progress: tqdm) -> Component:
    name = job.kind.component
    folder = bundle / name
    folder.mkdir()
    writer = PartWriter(folder)
    read = functools.lru_cache(maxsize=1)(job.source.read)  # slabs that share a tensor follow each other
    for slab in job.plan.slabs:
        with np.errstate(over="ignore"):
            array = slab.assemble(read)
        if job.dtype == np.float16 and not np.isfinite(array).all():
            raise OsjaxError(f"{slab.leaf} of {job.file} is too large for fp16: convert with --dtype bf16")
        for leaf, stored in _stored(job, slab, array).items():
            writer.add(leaf, slab.layer, stored)
        progress.update(slab.nbytes)
    writer.close()
    tokenizer = layout.tokenizer_files(job.file) if job.max_length else []
    for path in tokenizer:
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    return Component(
        kind=job.kind.name,
        config=dataclasses.asdict(job.config),
        dtype=job.dtype.name,
        parameters=job.parameters,
        bytes=job.nbytes,
        folder=name,
        tokenizer=f"{name}/tokenizer" if tokenizer else None,
        max_length=job.max_length,
        precision=job.precision,
    )


def _stored(job: Job, slab: Slab, array: np.ndarray) -> dict[str, np.ndarray]:
    """What is written of a slab's values: themselves, or numbers of 8 bits and their scales, by leaf."""
    if not job.quantizes(slab):
        return {slab.leaf: array}
    kernel = rounded_kernel(array, array.ndim - 1, job.precision)
    projection = slab.leaf.removesuffix(".kernel")
    return {slab.leaf: np.asarray(kernel.values), f"{projection}.scale": np.asarray(kernel.scale)}


def _quantized_bytes(slab: Slab) -> int:
    """Of a kernel in 8 bits, [F, O…], with float32 scales [O…]."""
    return math.prod(slab.shape) + 4 * math.prod(slab.shape[1:])


@contextlib.contextmanager
def _building(destination: Path, needed: int) -> Iterator[Path]:
    """An empty folder beside `destination` that takes its place when all went well and vanishes when it did not.

    What a killed conversion left there is removed; a lock, which dies with its process, tells it from a running one.
    """
    temporary = destination.with_name(f".{destination.name}.converting")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise OsjaxError(f"{destination} exists: remove it, or choose another destination")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise OsjaxError(f"cannot write to {destination.parent} ({error.strerror}): choose another place") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OsjaxError(f"another conversion writes {destination}: wait for it, or choose another place") from error
    try:
        _clear(temporary)
        free = shutil.disk_usage(temporary).free
        if free < needed:
            raise OsjaxError(
                f"{destination.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed: make room"
            )
        yield temporary
        os.replace(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _digest(file: Path, progress: tqdm) -> dict[str, Any]:
    """SHA-256 and size of a source file."""
    digest = hashlib.sha256()
    with reading(file), file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            progress.update(len(block))
    return {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}


def _common_folder(files: Sequence[Path]) -> str:
    return os.path.commonpath([file.parent for file in files])


def _source_dtype(source: Source) -> np.dtype:
    """The narrowest of bf16, fp16 and fp32 that holds every floating tensor of the file (fp64 is cut to fp32)."""
    dtypes = {shape.dtype for shape in source.shapes.values() if jnp.issubdtype(shape.dtype, jnp.floating)}
    wide = {np.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype for dtype in dtypes}
    return np.dtype(wide.pop()) if len(wide) == 1 and np.dtype(np.float64) not in wide else np.dtype(np.float32)


def _progress(total: int) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc="converting")
