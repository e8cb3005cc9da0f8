"""Request → Video: text, references, noise, denoising, decoding.

B requests of one shape are drawn together. T/H/W frames/height/width in pixels, t/h/w in latents, L text tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from osjax import adapters, pixels, provenance, room
from osjax.bundle import Bundle, read_bundle
from osjax.diagnose import first_bad_layer, not_finite
from osjax.errors import OsjaxError
from osjax.kernels.attention import choose_attention
from osjax.media import to_model
from osjax.models.operations import operations_for
from osjax.parallel.mesh import MeshShape, make_mesh, parse_mesh
from osjax.preflight import REFERENCES, Estimate, Setting, denoising, estimate
from osjax.record import Means, record
from osjax.request import Request, continuation_seed
from osjax.residency import Residency, chosen_precision
from osjax.roles import IMAGE, VIDEO, Roles, prompt_used, sampling_options
from osjax.sampling.latents import Text, sample_latents
from osjax.sampling.step import Where
from osjax.sizes import Shape, continued, read_references, shape_of
from osjax.text.tokenize import load_tokenizer
from osjax.video import Video

EMBEDDED = Path(__file__).parent / "assets" / "tiny"
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}

log = logging.getLogger(__name__)


@jax.jit
def encode_ids(encoder: Any, ids_bl: jax.Array) -> Any:
    """What a text encoder makes of token ids, int32 [B, L]: T5's states, or CLIP's states and pooled vectors."""
    return encoder(ids_bl)


class Texts(NamedTuple):
    """What requests that are drawn together say, encoded: prompts and negative prompts; seconds that it took."""

    prompt: Text
    negative: Text
    seconds: float


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A bundle on a mesh, ready to draw. Make one with `Pipeline.load`."""

    residency: Residency
    where: Where
    attention: str
    dtype: str
    label: str
    progress: bool
    roles: Roles = VIDEO
    offload_blocks: bool | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        mesh: str = "data=1,seq=1",
        dtype: str = "bf16",
        precision: str | None = None,
        offload: bool = False,
        offload_blocks: bool | None = None,
        attention: str = "auto",
        lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
        progress: bool = True,
    ) -> Pipeline:
        """Opens a bundle (None is the embedded tiny one); weights are read when they are first needed.

        mesh: `axis=size` pairs; dtype: bf16, fp16 or fp32 for weights and activations; precision: full, or fp8 or int8
        for the transformer's blocks, which is approximate, by default that of the weights; offload: parts that are not
        in use wait in host memory; offload_blocks: with it the transformer comes block by block and is never there as a
        whole, by default where it would not fit; attention: an implementation by name; lora: as in `use_lora`;
        progress: bars on standard error. Raises OsjaxError for a bundle, mesh, dtype, precision, attention or LoRA that
        cannot be used here.
        """
        if dtype not in DTYPES:
            raise OsjaxError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        bundle = read_bundle(EMBEDDED if path is None else Path(path))
        devices = make_mesh(parse_mesh(mesh))
        precision = chosen_precision(bundle, precision, devices.devices.flat[0])
        how = {"offload": offload, "precision": precision, "progress": progress}
        residency = Residency(bundle, devices, DTYPES[dtype], **how)
        label = "embedded tiny bundle" if path is None else Path(path).resolve().name
        pipeline = cls.over(
            residency, devices, dtype, attention, label, progress=progress, offload_blocks=offload_blocks
        )
        pipeline.use_lora(lora)
        return pipeline

    @classmethod
    def over(
        cls,
        residency: Residency,
        mesh: Mesh,
        dtype: str,
        attention: str,
        label: str,
        *,
        progress: bool,
        roles: Roles = VIDEO,
        offload_blocks: bool | None = None,
    ) -> Pipeline:
        """A pipeline over models of that dtype on the mesh, wherever they come from; label: what provenance calls them.

        Raises OsjaxError for an attention that cannot be used here, a model that the bundle does not have, or blocks
        that are to be offloaded by themselves where models are not.
        """
        if offload_blocks and not residency.offload:
            raise OsjaxError("offload_blocks brings an offloaded transformer block by block: give --offload True too")
        config = residency.config(roles.mmdit)
        chosen, attend = choose_attention(attention, mesh.devices.flat[0], DTYPES[dtype], config.head_dim)
        operations = operations_for(config, chosen, residency.precision)
        where = Where(mesh, attend, operations)
        return cls(residency, where, chosen, dtype, label, progress, roles, offload_blocks)

    def of_images(self) -> Pipeline:
        """A pipeline that draws single pictures with the bundle's FLUX, on the same devices and text encoders.

        Its requests have one frame; `guidance` is told to the model. LoRAs are not its. Raises OsjaxError if the bundle
        has no FLUX.
        """
        absent = [name for name in (IMAGE.mmdit, IMAGE.vae) if name not in self.bundle.components]
        if absent:
            missing = " and no ".join(absent)
            raise OsjaxError(
                f"bundle {self.bundle.path} has no {missing} to draw images with: osjax download flux1-dev --to ckpts, "
                "beside the other checkpoints, and convert them again"
            )
        how = {"progress": self.progress, "roles": IMAGE, "offload_blocks": self.offload_blocks}
        return self.over(self.residency, self.where.mesh, self.dtype, self.attention, self.label, **how)

    def use_lora(self, lora: Sequence[tuple[str | os.PathLike[str], float]] = ()) -> None:
        """From now on draws with these LoRAs, each the folder of one and its weight, and with no others.

        They are merged into the weights when those are next needed; without any, the weights are the bundle's again,
        to the bit. Raises OsjaxError for what is no LoRA, one of another model, or a weight that is not finite.
        """
        for path, weight in lora:
            if not math.isfinite(weight):
                raise OsjaxError(f"the weight of LoRA {path} is {weight}: give a finite number such as 0.8")
        self.residency.adapt([(adapters.read(path), float(weight)) for path, weight in lora])

    @property
    def loras(self) -> tuple[provenance.UsedLoRA, ...]:
        """The LoRAs in use, as provenance tells them."""
        used = self.residency.adapters if self.roles.mmdit == VIDEO.mmdit else ()
        return tuple(provenance.UsedLoRA(adapter.name, weight, adapter.sha256) for adapter, weight in used)

    @property
    def bundle(self) -> Bundle:
        return self.residency.bundle

    def request(self, **options: Any) -> Request:
        """A request whose other options are those that the bundle asks for. Raises OsjaxError as `Request.of` does."""
        return Request.of(dict(self.bundle.settings) | options)

    def __call__(self, request: Request) -> Video:
        """Draws one video. Raises OsjaxError as `run` does."""
        return self.run([request])[0]

    def run(self, requests: Sequence[Request], texts: Texts | None = None) -> list[Video]:
        """Draws requests that differ in prompts, references and seeds only; each is what it would be alone, but for
        rounding: the same request at the same place among as many repeats it bit for bit.

        texts: of these requests, if they are encoded already (`osjax.embedding.encode_all`).
        Raises OsjaxError for references that cannot be used, and if latents or pixels stop being finite (naming the
        step), or a device's memory is full; ValueError if the requests do not go together.
        """
        if any(request.shared() != requests[0].shared() for request in requests):
            raise ValueError("requests that are drawn together must differ in prompts, references and seeds only")
        with room.explaining_memory(lambda: self.shortage(requests)):
            return self._run(requests, texts)

    def _run(self, requests: Sequence[Request], texts: Texts | None) -> list[Video]:
        first = requests[0]
        seconds: dict[str, float] = {}
        shape = self.shape(first)
        clips = [read_references(request, shape) for request in requests]
        texts = texts or self._encode_texts(requests)
        seconds["text"] = texts.seconds
        frames_bthwc, passes = self._draw(requests, shape, texts, clips, seconds)
        shape = continued(shape, first, self.residency.config(self.roles.vae))  # of what is added, if anything is
        for number in range(1, first.extend + 1):
            last = [[to_model(frames[-shape.reference_frames :])] for frames in frames_bthwc]
            seeded = [dataclasses.replace(r, seed=continuation_seed(r.seed, number)) for r in requests]
            new_bthwc, more = self._draw(seeded, shape, texts, last, seconds)
            frames_bthwc, passes = np.concatenate([frames_bthwc, new_bthwc], axis=1), passes + more
        mesh, digest = self.where.mesh, self.bundle.digest
        precision = self.residency.precision
        in_blocks = self.in_blocks(requests)
        means = Means(
            self.label, digest, self.loras, mesh, self.dtype, precision, self.attention, self.roles, in_blocks
        )
        return [
            Video(frames, request.fps, record(means, requests, index, frames, passes, seconds))
            for index, (request, frames) in enumerate(zip(requests, frames_bthwc, strict=True))
        ]

    def _draw(
        self,
        requests: Sequence[Request],
        shape: Shape,
        texts: Texts,
        clips: Sequence[Sequence[np.ndarray]],
        seconds: dict[str, float],
    ) -> tuple[np.ndarray, int]:
        """(frames [B, T, H, W, 3] that the shape keeps, forward passes of each); clips: the references, as read."""
        with _timed(seconds, "references"):
            if any(clips):
                has_room = lambda: self.estimate(requests).allows_transformer(during=REFERENCES)  # noqa: E731
                self.residency.expect(self.roles.mmdit, has_room, in_blocks=self.in_blocks(requests))
            references = [self.encode_references(r, some) for r, some in zip(requests, clips, strict=True)]
        with _timed(seconds, "denoise"):
            z_bthwc, passes = self.draw_latents(requests, shape, texts.prompt, texts.negative, references)
        with _timed(seconds, "decode"):
            return self.decode(z_bthwc)[:, shape.kept], passes

    def shape(self, request: Request) -> Shape:
        """Sizes in pixels and latents, of what is drawn at once.

        Raises OsjaxError as `shape_of` does.
        """
        vae, mmdit = self.residency.config(self.roles.vae), self.residency.config(self.roles.mmdit)
        return shape_of(request, vae, mmdit.patch_size)

    def estimate(self, requests: Sequence[Request], beside: Sequence[str] | None = None) -> Estimate:
        """What drawing these together takes of the devices; nothing is loaded.

        beside: models that are there from before, by default those that are now. With offloading none is. Raises
        OsjaxError as `shape` does.
        """
        held = tuple(self.residency.loaded if beside is None else beside)
        setting = dataclasses.replace(self._setting(requests), in_blocks=self.in_blocks(requests))
        return estimate(self.bundle, setting if setting.offload else dataclasses.replace(setting, beside=held))

    def _setting(self, requests: Sequence[Request]) -> Setting:
        residency, mesh = self.residency, MeshShape(**self.where.mesh.shape)
        how = {"roles": self.roles, "precision": residency.precision, "in_parts": residency.in_parts}
        return Setting(tuple(requests), mesh, residency.dtype, residency.offload, self.attention, **how)

    def in_blocks(self, requests: Sequence[Request]) -> bool:
        """Whether the transformer comes block by block to draw these: as was asked, else where it would not fit."""
        if self.offload_blocks is not None or not self.residency.offload:
            return bool(self.offload_blocks)
        there = room.least(list(self.where.mesh.devices.flat))
        return there is not None and denoising(self.bundle, self._setting(requests)).total > there.total

    def transformer(self, requests: Sequence[Request]) -> contextlib.AbstractContextManager[Any]:
        """The model that draws these, on the devices or on its way block by block."""
        return self.residency.on_device(self.roles.mmdit, in_blocks=self.in_blocks(requests))

    def shortage(self, requests: Sequence[Request]) -> str:
        """One line: what these need on each device, what there is, and which option would help."""
        there = room.least(list(self.where.mesh.devices.flat))
        return room.shortage(self.bundle, self.estimate(requests), there and there.total, jax.device_count())

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Prompts as the model is to see them → Text; a prompt that is too long is cut, with a warning."""
        encoded = []
        for name in ("t5", "clip"):
            max_length = self.bundle.component(name).max_length
            vocabulary = self.residency.config(name).vocab_size
            tokenizer = load_tokenizer(self.bundle.tokenizer(name), max_length, vocab_size=vocabulary)
            ids_bl, cut = tokenizer.encode(prompts)
            if name == "t5" and any(cut):
                log.warning("a prompt is over %d tokens long: the rest is cut off", max_length)
            with self.residency.on_device(name) as encoder:
                encoded.append(encode_ids(encoder, ids_bl))
                if not pixels.all_finite(encoded[-1]):
                    layer = first_bad_layer(encoder, lambda encoder, ids_bl=ids_bl: encode_ids(encoder, ids_bl))
                    raise not_finite("the embeddings of the prompts are", layer, self.residency.dtype, pixels.BROKEN)
        states_blc, (_, pooled_bp) = encoded
        return Text(states_blc, pooled_bp)

    def _encode_texts(self, requests: Sequence[Request]) -> Texts:
        start = time.perf_counter()
        text = self.encode_text([prompt_used(request, self.roles) for request in requests])
        negative = self.encode_text([request.negative_prompt for request in requests])
        return Texts(text, negative, time.perf_counter() - start)

    def encode_references(self, request: Request, clips: Sequence[np.ndarray]) -> list[jax.Array]:
        """Clips THWC in [-1, 1] → latents thwc, each encoded by itself: posterior mode, or a sample by the seed."""
        key = jax.random.fold_in(jax.random.key(request.seed), 1) if request.sample_posterior else None
        return pixels.encode(self.residency, self.roles.vae, clips, key)

    def draw_latents(
        self,
        requests: Sequence[Request],
        shape: Shape,
        text: Text,
        negative: Text,
        references: Sequence[list[jax.Array]],
    ) -> tuple[jax.Array, int]:
        """(latents bthwc ready to decode, forward passes that each of them took)."""
        one = shape.grid.noise_shape(self.residency.config(self.roles.mmdit).latent_channels)
        noise_bthwc = jnp.concatenate([jax.random.normal(jax.random.key(r.seed), one) for r in requests])
        steps = {"total": requests[0].num_steps, "desc": "denoise", "unit": "step", "disable": not self.progress}
        with self.transformer(requests) as mmdit, tqdm(**steps) as bar:  # whose time is without loading
            return sample_latents(
                mmdit,
                noise_bthwc,
                text,
                negative,
                references,
                shape.kind,
                sampling_options(requests[0]),
                self.where,
                on_step=lambda *_: bar.update(),
                causal=self.residency.config(self.roles.vae).causal,
            )

    def decode(self, z_bthwc: jax.Array) -> np.ndarray:
        """Latents → uint8 frames [B, T, H, W, 3], one video at a time. Raises OsjaxError if they are not finite."""
        return pixels.decode(self.residency, self.roles.vae, z_bthwc, progress=self.progress)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
