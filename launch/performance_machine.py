"""Stages of `launch/performance_stages.py` that are about the machine, whatever the size of a video."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch import measure_attention, measure_training
from launch.performance_sizes import Figures, entry, models_of
from launch.random_bundle import write_component
from osjax import benchmark, random_weights
from osjax.benchmark import timed
from osjax.liveness import tree_bytes
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.preflight import GB
from osjax.residency import Residency, abstract_model


def load(size: str, runs: int, *, tiny: bool) -> Figures:
    """Reading the MMDiT from a disk's cache onto the device as the pipeline does, from files as a converter writes."""
    del size
    bundle, mesh = random_weights.bundle_of({"mmdit": models_of(tiny)["mmdit"]}), make_mesh(MeshShape())
    component = bundle.component("mmdit")
    with tempfile.TemporaryDirectory() as folder:
        bundle = dataclasses.replace(bundle, path=Path(folder))
        write_component(bundle.folder("mmdit"), component, mesh)
        seconds, first = timed(lambda: _read(Residency(bundle, mesh, jnp.bfloat16, offload=False)), runs)
    gigabytes = tree_bytes(abstract_model(component, jnp.bfloat16)) / GB
    how = f"median of {runs} after a first: {gigabytes:.3g} GB of the MMDiT, parts of 64 MB, from the disk's cache"
    return {"load_gb_per_s": entry(gigabytes / seconds, how, first_s=round(first + seconds, 2))}


def ceilings(size: str, runs: int, *, tiny: bool) -> Figures:
    side, bytes_read = (64, 2**16) if tiny else (8192, 2**31)
    x = jnp.ones(bytes_read // 2, jnp.bfloat16)
    lap = measure_attention.seconds(jax.jit(jnp.negative), [x], 10, runs)
    rate = measure_training.matmul_rate(side, side, side, runs)
    return {
        "matmul_tflops": entry(rate / 1e12, f"median of {runs}: bf16 products of {side} x {side} matrices, queued"),
        "copy_gb_per_s": entry(
            2 * bytes_read / lap / GB, f"median of {runs}: {bytes_read} bytes read, negated, written; queued"
        ),
    }


def _read(residency: Residency) -> Any:
    with residency.on_device("mmdit") as model:
        return benchmark.weights_of(model)
