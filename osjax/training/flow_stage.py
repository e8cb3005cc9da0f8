"""Training the MMDiT, alone or with its text encoders, or an adapter of it, by rectified flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from osjax import adapters
from osjax.kernels.attention import Attention
from osjax.models import lora
from osjax.models.lora import LoRA
from osjax.sampling.latents import Text
from osjax.text.tokenize import Tokenizer
from osjax.training import conditions, sampling, text
from osjax.training.batches import Drawn, Encoded, Latents, encode, put, video_of
from osjax.training.encoding import Caches, latents_of, texts_of
from osjax.training.flow import draw, flow_loss, grid_of
from osjax.training.options import TrainConfig
from osjax.training.parts import Parts, export, only
from osjax.training.remat import POLICIES
from osjax.training.state import Weights
from osjax.training.streams import Stream


class FlowBatch(NamedTuple):
    """On the mesh: latents, and prompts as token ids or encoded."""

    latents: Latents
    prompts: text.Prompts


@dataclasses.dataclass(frozen=True)
class FlowStage:
    """See `osjax.training.stages.Stage`. An adapter (`adapter`) is trained in place of the MMDiT, which is frozen.

    empty: the empty prompt, one row, as token ids or encoded like the prompts of every batch.
    """

    config: TrainConfig
    parts: Parts
    mesh: Mesh
    stream: Stream
    attention: Attention
    tokenizers: Mapping[str, Tokenizer]
    empty: text.Prompts
    caches: Caches

    def loss(
        self, trained: Weights, frozen: Weights, batch: FlowBatch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        options, modules = self.config.flow, self.modules(trained, frozen)
        kinds, dropped, noise = jax.random.split(key, 3)
        model, ratio = modules["mmdit"], modules["vae"].config.time_compression_ratio
        clean = conditions.condition_clips(batch.latents, options.conditions, ratio, kinds)
        prompts = text.drop(batch.prompts, self.empty, dropped, options.t5_dropout, options.clip_dropout)
        grid = grid_of(clean.z_bthwc, model.config.patch_size)
        loss, _ = flow_loss(
            model,
            clean,
            text.embed(modules, prompts),
            draw(noise, grid, model.config.latent_channels, len(clean.z_bthwc)),
            self.attention,
            remat=POLICIES[self.config.run.remat],
            loss_on_given=options.loss_on_given,
            flow_shift=options.flow_shift,
        )
        return loss, {}

    def modules(self, trained: Weights, frozen: Weights) -> dict[str, Any]:
        """Every module, the MMDiT with its adapter attached if one is trained."""
        if not self.config.lora.rank:
            return self.parts.build(trained, frozen)
        modules = self.parts.build(frozen)
        return modules | {"mmdit": lora.attach(modules["mmdit"], adapter(trained, self.config))}

    def prepare(self, frozen: Weights, batch: Any) -> FlowBatch:
        if isinstance(batch, Encoded):
            latents, prompts = put((Latents(batch.z_bthwc, dict(batch.ends)), batch.prompts), self.mesh)
            return FlowBatch(_in_float32(latents), prompts)
        ids = put(text.tokenized(self.tokenizers, batch.captions), self.mesh)
        if isinstance(batch, Drawn):
            latents, prompts = self.encode(frozen, batch), ids
        else:
            latents = latents_of(batch.latents, self.caches.latents, self.mesh, lambda: self.encode(frozen, batch))
            texts = texts_of(batch.texts, self.caches.texts, self.mesh, lambda: embed_frozen(self.parts, frozen, ids))
            prompts = ids if texts is None else texts
        return FlowBatch(_in_float32(latents), prompts)

    def encode(self, frozen: Weights, batch: Any) -> Latents:
        """Latents of a batch of videos, drawn or read from files, and of the ends that conditions give."""
        vae = self.parts.build(only(frozen, "vae"))["vae"]
        ends = frozenset(conditions.all_ends(self.config.flow.conditions, vae.config.time_compression_ratio))
        return _encode(vae, video_of(batch, self.mesh), ends)

    def samples(self, trained: Weights, frozen: Weights, batch: FlowBatch) -> Iterator[tuple[str, np.ndarray]]:
        """The prompts of `run.sample_prompts`, drawn by the pipeline that users have."""
        modules = self.modules(trained, frozen)
        return sampling.draw_prompts(self.parts, modules, self.mesh, self.config)

    def export(self, folder: Path, trained: Weights, frozen: Weights, batch: FlowBatch) -> Path:
        """`bundle`, or `lora` if an adapter is trained."""
        if not self.config.lora.rank:
            return export(self.parts, frozen | trained, folder / "bundle", {})
        place = folder / "lora"
        adapters.save(place, adapter(trained, self.config), self.parts.modules["mmdit"].config, replace=True)
        return place


def embed_frozen(parts: Parts, frozen: Weights, ids: text.TokenIds) -> Text:
    """Embeddings of token ids by the frozen text encoders."""
    return _embed(parts.build(only(frozen, "t5"), only(frozen, "clip")), ids)


def adapter(weights: Weights, config: TrainConfig) -> LoRA:
    """The adapter whose arrays are the weights `lora.…`."""
    arrays = {name.removeprefix("lora."): array for name, array in weights.items()}
    return LoRA.of_arrays(arrays, config.lora.alpha / config.lora.rank)


def _in_float32(latents: Latents) -> Latents:
    return jax.tree.map(lambda each: each.astype(jnp.float32), latents)


_encode = jax.jit(encode, static_argnums=2)
_embed = jax.jit(text.embed)
