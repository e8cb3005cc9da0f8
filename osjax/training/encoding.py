"""Latents and text embeddings of a batch by frozen encoders, looked up in caches first.

B clips of this host, t/h/w latent frames/rows/columns, c latent channels, L tokens, P pooled-text width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from osjax.errors import OsjaxError
from osjax.sampling.latents import Text
from osjax.training.batches import End, Latents, local_rows, put
from osjax.training.cache import Cache, Entries
from osjax.training.options import TrainConfig
from osjax.training.parts import Parts

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Caches:
    """Where latents and embeddings of files are kept; None for what is computed each time."""

    latents: Cache | None = None
    texts: Cache | None = None


def open_caches(config: TrainConfig, parts: Parts, ends: Sequence[End]) -> Caches:
    """The caches in `data.cache`, apart for every autoencoder and pair of text encoders.

    Raises OsjaxError if there is nothing to keep: clips that are drawn, or encoders that change.
    """
    if config.data.cache is None:
        return Caches()
    if config.data.path is None:
        raise OsjaxError("data.cache keeps what is made of files: give data.path too, or for shapes data.clips")
    changing = sorted({"vae", "t5", "clip"} & set(parts.trained))
    if changing:
        raise OsjaxError(f"data.cache cannot keep what {', '.join(changing)} makes, being trained: leave it out")
    folder = Path(config.data.cache)
    return Caches(
        Cache(folder / "latents", f"{parts.digest} {sorted(ends)}"), Cache(folder / "texts", f"{parts.digest}")
    )


def latents_of(entries: Entries | None, cache: Cache | None, mesh: Mesh, encode: Callable[[], Latents]) -> Latents:
    """Latents over the mesh: the cached ones, or those that `encode` makes, which are then kept."""
    if entries is None:
        return encode()
    return _from_arrays(put(_cached(entries, cache, mesh, lambda: _to_arrays(encode())), mesh))


def texts_of(entries: Entries | None, cache: Cache | None, mesh: Mesh, embed: Callable[[], Text]) -> Text | None:
    """Embeddings over the mesh in the same way; None where no cache is used."""
    if entries is None:
        return None
    return Text(**put(_cached(entries, cache, mesh, lambda: embed()._asdict()), mesh))


def _cached(entries: Entries, cache: Cache, mesh: Mesh, make: Callable[[], Arrays]) -> Arrays:
    """This host's rows. All hosts compute together if any of them misses an entry."""
    missing = entries.arrays is None
    if jax.process_count() > 1:
        anywhere = bool(multihost_utils.process_allgather(np.asarray(missing)).any())
    else:
        anywhere = missing
    made = local_rows(dict(make()), mesh) if anywhere else {}
    if not missing:
        return entries.arrays
    for row, key in enumerate(entries.keys):
        cache.put(key, {name: array[row] for name, array in made.items()})
    return made


def _to_arrays(latents: Latents) -> dict[str, jax.Array]:
    return {"z": latents.z_bthwc} | {f"{side}.{count}": each for (side, count), each in latents.ends.items()}


def _from_arrays(arrays: Arrays) -> Latents:
    ends = {name: array for name, array in arrays.items() if name != "z"}
    return Latents(
        arrays["z"], {(side, int(count)): each for name, each in ends.items() for side, count in [name.split(".")]}
    )
