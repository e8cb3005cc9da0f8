"""A bundle of micro models, drawn once for all tests that need some weights."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

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
