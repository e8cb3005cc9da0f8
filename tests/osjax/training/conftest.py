"""A bundle of micro models, drawn once for all tests that need some weights, and programs that are compiled once."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.training.parts import export
from osjax.training.stages import open_stage
from tests.osjax.training import micro


@pytest.fixture(scope="session")
def micro_bundle(tmp_path_factory) -> Path:
    """All parts of `micro.flow`, in float32; not to be changed."""
    folder = tmp_path_factory.mktemp("micro")
    config = dataclasses.replace(micro.flow(), data=micro.DATA)
    stage, trained, frozen = open_stage(config, make_mesh(TrainingMeshShape()), folder)
    stage.stream.close()
    return export(stage.parts, trained | frozen, folder / "bundle", {}, jnp.float32)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory) -> Iterator[Path]:
    """Where programs are kept, for modules of which several runs compile the same ones."""
    folder = tmp_path_factory.mktemp("programs")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(folder))
    jax.config.update(names[1], 0.2)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
