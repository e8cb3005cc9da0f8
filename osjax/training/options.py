"""What a training run is told: frozen dataclasses, one for each section of a file in `configs/train/`.

Every field has its default here and nowhere else. Steps are optimizer steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from osjax.errors import OsjaxError
from osjax.request import MAX_SEED
from osjax.training.shapes import TWO_THINGS_SHARE

REMAT = ("blocks", "products", "elementwise", "nothing")  # the keys of `osjax.training.remat.POLICIES`


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OsjaxError(f"{name} is {value}: give a share from 0 to 1")


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; the defaults are those of Open-Sora 2.0.

    warmup_steps: linear from 0 to `lr`; schedule: then `constant`, or `cosine` down to `final_lr_share` · lr as
    the run ends; accumulate: batches whose gradients are averaged into one step; ema_decay: of the averaged
    weights that are exported and sampled from, 0 for none.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: str = "constant"
    final_lr_share: float = 0.0
    accumulate: int = 1
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise OsjaxError(f"unknown optim.schedule {self.schedule!r}: use constant or cosine")
        if self.accumulate < 1 or self.warmup_steps < 0:
            raise OsjaxError("optim.accumulate must be at least 1 and optim.warmup_steps at least 0: mend the config")
        if not 0 <= self.ema_decay < 1:
            raise OsjaxError(f"optim.ema_decay is {self.ema_decay}: use 0 for none, or a number below 1")


@dataclasses.dataclass(frozen=True)
class FlowOptions:
    """Rectified flow (specification, section 8).

    t5_dropout, clip_dropout: chance that this text encoder gets the empty prompt, each by itself; conditions: kind →
    weight it is drawn with; loss_on_given: whether latent frames that a reference gives count in the loss; flow_shift:
    how strongly noise levels are shifted towards noise, in place of what the video's size asks for.
    """

    t5_dropout: float = 0.316
    clip_dropout: float = 0.316
    conditions: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 1.0}
    )
    loss_on_given: bool = True
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        _check_share("flow.t5_dropout", self.t5_dropout)
        _check_share("flow.clip_dropout", self.clip_dropout)
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise OsjaxError(f"flow.flow_shift is {self.flow_shift}: give a number above 0, or leave it out")


@dataclasses.dataclass(frozen=True)
class VAEOptions:
    """Autoencoder: mean absolute and squared error of the pixels, and the KL divergence to a standard normal.

    given_share: of the clips whose first latent frame, and of those whose last, is that of the frame encoded alone.
    """

    l1_weight: float = 1.0
    l2_weight: float = 1.0
    kl_weight: float = 1e-6
    given_share: float = 0.25

    def __post_init__(self) -> None:
        _check_share("vae.given_share", self.given_share)


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters (Hu et al. 2021); rank 0 trains the weights themselves.

    targets: which projections, by the last names of their modules (see `osjax/models/lora.py`).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv.lin", "proj", "mlp_in", "mlp_out", "out")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where clips come from: a table of files, or the procedural shapes if `path` is None.

    resolution, aspect_ratios, num_frames: the buckets, every combination of them (of shapes, what is named twice is
    drawn twice as often); fps: that clips are brought close to; cache: folder for latents and text embeddings of files,
    None for none; clips: of shapes, made up once and reused (`flow` encodes them once, too), 0 for new ones in every
    batch; two_things: share of the shapes clips that show two things; workers: files read at a time.
    """

    path: str | None = None
    resolution: tuple[str, ...] = ("256px",)
    aspect_ratios: tuple[str, ...] = ("16:9", "1:1", "9:16")
    num_frames: tuple[int, ...] = (33,)
    fps: int = 24
    cache: str | None = None
    clips: int = 0
    two_things: float = TWO_THINGS_SHARE
    workers: int = 8

    def __post_init__(self) -> None:
        _check_share("data.two_things", self.two_things)
        if self.fps < 1 or self.workers < 1 or self.clips < 0:
            raise OsjaxError("data.fps and data.workers must be at least 1, data.clips at least 0: mend the config")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The run itself.

    batch_size: clips a batch over all devices; dtype: of the computation, the weights being float32; remat: what of the
    MMDiT's blocks the backward pass computes again (`osjax/training/remat.py`); save_every, keep: checkpoints, and how
    many of them are kept; sample_every: steps between sample videos, 0 for none; sample_prompts: what they show.
    """

    steps: int = 1000
    batch_size: int = 8
    seed: int = 42
    mesh: str = "data=1"
    dtype: str = "bf16"
    attention: str = "auto"
    remat: str = "blocks"
    log_every: int = 10
    save_every: int = 500
    keep: int = 3
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise OsjaxError(f"run.{name} is {getattr(self, name)}: give at least 1")
        if self.remat not in REMAT:
            raise OsjaxError(f"run.remat is {self.remat!r}: use one of {', '.join(REMAT)}")
        if not 0 <= self.seed <= MAX_SEED:
            raise OsjaxError(f"run.seed is {self.seed}: give a whole number from 0 to {MAX_SEED}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. stage: what is trained, `vae`, `text` (both encoders, on captions alone) or `flow`.

    ckpt_path: bundle that the run starts from (None: nothing); new: component → its options, for components that start
    from random numbers; trained: components whose weights change, the others being frozen; settings:
    options of generation that the exported bundle asks for, besides those of the bundle that the run starts from.
    """

    stage: str = "flow"
    ckpt_path: str | None = None
    new: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    trained: tuple[str, ...] = ("mmdit",)
    run: RunOptions = RunOptions()
    optim: OptimOptions = OptimOptions()
    flow: FlowOptions = FlowOptions()
    vae: VAEOptions = VAEOptions()
    lora: LoRAOptions = LoRAOptions()
    data: DataOptions = DataOptions()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in ("flow", "text", "vae"):
            raise OsjaxError(f"unknown stage {self.stage!r}: use flow, text or vae")
