"""From a run's config to its stage: models opened, tokenizers made, the stream of batches chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from osjax.errors import OsjaxError
from osjax.kernels.attention import choose_attention
from osjax.models import lora
from osjax.parallel.local_attention import attend_locally
from osjax.pipeline import DTYPES
from osjax.request import Request
from osjax.residency import MODELS
from osjax.sampling.geometry import check_frames
from osjax.text.save import SPECIAL
from osjax.training import procedural
from osjax.training.batches import local_batch, local_rows
from osjax.training.buckets import Bucket, make_buckets
from osjax.training.conditions import all_ends
from osjax.training.encoding import Caches, open_caches
from osjax.training.flow_stage import FlowStage, embed_frozen
from osjax.training.loader import open_loader
from osjax.training.options import TrainConfig
from osjax.training.parts import Parts, load_weights, named, open_parts
from osjax.training.state import Weights
from osjax.training.streams import Stream
from osjax.training.text import load_tokenizers, tokenized
from osjax.training.text_stage import TextStage, readouts
from osjax.training.tokenizers import train_tokenizer
from osjax.training.vae_stage import VAEStage

_NEEDED = {"vae": ("vae",), "text": ("t5", "clip"), "flow": ("mmdit", "vae", "t5", "clip")}  # components, by stage
_TRAINS = {"vae": ("vae",), "text": ("clip", "t5"), "flow": ("clip", "mmdit", "t5")}


class Stage(Protocol):
    """What the loop asks of a stage. Weights are flat dictionaries, as in `osjax.training.parts`.

    prepare: a batch of the stream as `loss` takes it, on the mesh; samples: named clips to look at, uint8 [T, H, W, 3];
    export: writes what users load into the run's folder, and returns its path. The last two see the newest batch.
    """

    config: TrainConfig
    parts: Parts
    stream: Stream

    def loss(
        self, trained: Weights, frozen: Weights, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...
    def prepare(self, frozen: Weights, batch: Any) -> Any: ...
    def samples(self, trained: Weights, frozen: Weights, batch: Any) -> Iterator[tuple[str, np.ndarray]]: ...
    def export(self, folder: Path, trained: Weights, frozen: Weights, batch: Any) -> Path: ...


def open_stage(config: TrainConfig, mesh: Mesh, folder: Path) -> tuple[Stage, Weights, Weights]:
    """(stage, trained weights, frozen weights). New tokenizers and what is cached go into the run's folder.

    Raises OsjaxError for models, data, sizes or an attention that do not go together.
    """
    dtype = _dtype(config)
    parts = open_parts(config.ckpt_path, _with_tokenizers(config.new, folder), _changing(config), dtype)
    parts = dataclasses.replace(parts, settings=dict(parts.settings) | dict(config.settings))
    Request.of({"prompt": "-"} | parts.settings)  # what cannot be asked for is told before training, not after
    share = procedural.Share(local_batch(config.run.batch_size, mesh), jax.process_index(), jax.process_count())
    _check_whole(config, parts)
    if config.stage == "text":
        return _open_text(config, parts, mesh, share)
    buckets = _buckets(config, parts)
    if config.stage == "vae":
        stream = _videos(config, buckets, share, open_caches(config, parts, ()))
        return VAEStage(config, parts, mesh, stream), *load_weights(parts, mesh, jax.random.key(config.run.seed))
    model = parts.modules["mmdit"].config
    _, attend = choose_attention(config.run.attention, mesh.devices.flat[0], dtype, model.head_dim, gradient=True)
    attention = attend_locally(attend, mesh)
    ends = all_ends(config.flow.conditions, parts.modules["vae"].config.time_compression_ratio)
    caches = open_caches(config, parts, ends)
    stream = _videos(config, buckets, share, caches)
    adapter = _adapter(config, parts) if config.lora.rank else {}
    trained, frozen = load_weights(parts, mesh, jax.random.key(config.run.seed))
    tokenizers = load_tokenizers(parts.components)
    empty = tokenized(tokenizers, [""])
    if caches.texts is not None:
        empty = embed_frozen(parts, frozen, empty)
    stage = FlowStage(config, parts, mesh, stream, attention, tokenizers, empty, caches)
    return _encoded_once(stage, frozen, buckets, share), trained | adapter, frozen


def _open_text(
    config: TrainConfig, parts: Parts, mesh: Mesh, share: procedural.Share
) -> tuple[TextStage, Weights, Weights]:
    if config.data.path is not None:
        raise OsjaxError("stage text reads captions of shapes, whose facts are known: leave out data.path")
    tokenizers, seed = load_tokenizers(parts.components), config.run.seed
    stream = procedural.said_stream(config.data, share, seed, lambda captions: tokenized(tokenizers, captions))
    trained, frozen = load_weights(parts, mesh, jax.random.key(seed))
    return TextStage(config, parts, mesh, stream), trained | readouts(parts, jax.random.key(seed), mesh), frozen


def _check_whole(config: TrainConfig, parts: Parts) -> None:
    missing = [name for name in _NEEDED[config.stage] if name not in parts.components]
    if missing:
        raise OsjaxError(f"stage {config.stage} needs a {' and a '.join(missing)} too: give ckpt_path or new")
    if "vae" not in _NEEDED[config.stage]:
        return
    kind = parts.components["vae"].kind
    if kind != "hunyuan_vae":
        raise OsjaxError(f"stage {config.stage} cannot use a {kind}: give a bundle whose vae is a hunyuan_vae")


def _changing(config: TrainConfig) -> tuple[str, ...]:
    """The components whose own weights change. Raises OsjaxError for components that the stage cannot train."""
    if config.lora.rank and config.trained != ("mmdit",):
        raise OsjaxError(
            f"an adapter is trained of the mmdit, not of {', '.join(config.trained)}: set trained to mmdit"
        )
    able = _TRAINS[config.stage]
    if not config.trained or set(config.trained) - set(able):
        raise OsjaxError(
            f"stage {config.stage} trains {', '.join(able)}, not {', '.join(config.trained) or 'nothing'}: mend trained"
        )
    return () if config.lora.rank else config.trained


def _dtype(config: TrainConfig) -> jnp.dtype:
    if config.run.dtype not in DTYPES:
        raise OsjaxError(f"unknown dtype {config.run.dtype!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[config.run.dtype]


def _with_tokenizers(new: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The new components; text encoders that name no tokenizer get one that is trained on the shapes' captions."""
    made = {}
    for name, options in new.items():
        made[name] = dict(options)
        if options.get("kind") in SPECIAL and options.get("tokenizer") is None:
            place = folder / "tokenizers" / name
            default = MODELS[options["kind"]][1].vocab_size
            train_tokenizer(options["kind"], options.get("vocab_size", default), place)
            made[name]["tokenizer"] = str(place)
    return made


def _buckets(config: TrainConfig, parts: Parts) -> tuple[Bucket, ...]:
    """The shapes of clips, of whole tokens where there is a transformer, else of whole latents."""
    patch = parts.modules["mmdit"].config.patch_size if "mmdit" in parts.modules else 1
    vae = parts.modules["vae"].config
    multiple = vae.spatial_compression_ratio * patch
    for frames in config.data.num_frames:
        try:
            check_frames(frames, vae.time_compression_ratio)
        except OsjaxError as error:
            raise OsjaxError(f"data.num_frames: {error}") from error
    return make_buckets(config.data.resolution, config.data.aspect_ratios, config.data.num_frames, multiple)


def _adapter(config: TrainConfig, parts: Parts) -> Weights:
    options = config.lora
    key = jax.random.key(config.run.seed)
    return named("lora", lora.init(parts.modules["mmdit"], options.rank, options.alpha, options.targets, key).arrays)


def _videos(config: TrainConfig, buckets: tuple[Bucket, ...], share: procedural.Share, caches: Caches) -> Stream:
    data, seed = config.data, config.run.seed
    if data.path is None:
        return procedural.drawn_stream(data, buckets, share, seed)
    return open_loader(
        data, buckets, share.clips, seed, share.index, share.count, latents=caches.latents, texts=caches.texts
    )


def _encoded_once(stage: FlowStage, frozen: Weights, buckets: tuple[Bucket, ...], share: procedural.Share) -> FlowStage:
    """The stage on shapes that are encoded before training starts, if the config limits how many there are."""
    data, seed = stage.config.data, stage.config.run.seed
    if data.path is not None or not data.clips:
        return stage
    shelves = procedural.encoded_shelves(
        data,
        buckets,
        share,
        seed,
        lambda batch: local_rows(stage.encode(frozen, batch), stage.mesh),
        lambda captions: tokenized(stage.tokenizers, captions),
    )
    stage.stream.close()
    return dataclasses.replace(stage, stream=procedural.encoded_stream(shelves, share.clips, seed))
