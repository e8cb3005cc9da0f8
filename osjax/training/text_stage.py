"""Training the text encoders on captions alone, so that they come to the MMDiT with something to say.

The loss of rectified flow tells an encoder little: after 54,000 steps single things were right and pairs mixed up, four
of five of them without CLIP's vector. Read off directly, what a caption says is learned in a thousand steps. Each
fact is read by a linear layer: from CLIP's pooled vector, and from one weighted mean of T5's tokens, whose weights come
from a query of that fact. Readouts are thrown away in the end.

B captions, L tokens, C width, F facts, a answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from osjax.training import text
from osjax.training.batches import put
from osjax.training.facts import FACTS
from osjax.training.options import TrainConfig
from osjax.training.parts import Parts, export, named, only
from osjax.training.procedural import Said
from osjax.training.state import Weights
from osjax.training.streams import Stream

_READOUT = "readout"


@dataclasses.dataclass(frozen=True)
class TextStage:
    """See `osjax.training.stages.Stage`. Of the weights that are trained, readouts are no component's."""

    config: TrainConfig
    parts: Parts
    mesh: Mesh
    stream: Stream

    def loss(
        self, trained: Weights, frozen: Weights, batch: Said, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of both encoders' answers, summed over facts, in nats; reports what share of the captions each
        of them reads without a mistake."""
        readout = {name.removeprefix(f"{_READOUT}."): array for name, array in only(trained, _READOUT).items()}
        tokens_blc, pooled_bc = text.embed(self.parts.build(trained, frozen), batch.prompts)
        sources = {
            "t5": _weighted_means(tokens_blc.astype(jnp.float32), readout["t5.query"]),
            "clip": [pooled_bc.astype(jnp.float32)] * len(FACTS),
        }
        loss, reports = jnp.zeros(()), {}
        for encoder, facts in sources.items():
            wrong_b = jnp.zeros(len(pooled_bc), bool)
            for index, (fact, source_bc) in enumerate(zip(FACTS, facts, strict=True)):
                logits_ba = source_bc @ readout[f"{encoder}.{fact}.kernel"] + readout[f"{encoder}.{fact}.bias"]
                right_b = batch.facts_bf[:, index]
                loss += optax.softmax_cross_entropy_with_integer_labels(logits_ba, right_b).mean()
                wrong_b |= logits_ba.argmax(axis=-1) != right_b
            reports[f"{encoder}_right"] = 1 - wrong_b.mean()
        return loss, reports

    def prepare(self, frozen: Weights, batch: Said) -> Said:
        return put(batch, self.mesh)

    def samples(self, trained: Weights, frozen: Weights, batch: Said) -> Iterator[tuple[str, np.ndarray]]:
        """Nothing: there are no clips yet."""
        return iter(())

    def export(self, folder: Path, trained: Weights, frozen: Weights, batch: Said) -> Path:
        """`bundle`."""
        return export(self.parts, frozen | trained, folder / "bundle", {})


def readouts(parts: Parts, key: jax.Array, mesh: Mesh) -> Weights:
    """New readouts on every device of the mesh, float32: `readout.t5.query` [F, C], and for each encoder and fact a
    `kernel` [C, a] and a `bias` [a]. They begin without an opinion."""
    widths = {"t5": parts.modules["t5"].config.d_model, "clip": parts.modules["clip"].config.hidden_size}
    arrays = {"t5.query": jax.random.normal(key, (len(FACTS), widths["t5"])) * widths["t5"] ** -0.5}
    for encoder, width in widths.items():
        for fact, answers in FACTS.items():
            arrays[f"{encoder}.{fact}.kernel"] = jnp.zeros((width, answers))
            arrays[f"{encoder}.{fact}.bias"] = jnp.zeros(answers)
    return jax.device_put(named(_READOUT, arrays), NamedSharding(mesh, PartitionSpec()))


def _weighted_means(tokens_blc: jax.Array, query_fc: jax.Array) -> jax.Array:
    """[F, B, C]."""
    weights_bfl = jax.nn.softmax(jnp.einsum("fc,blc->bfl", query_fc, tokens_blc), axis=-1)
    return jnp.einsum("bfl,blc->fbc", weights_bfl, tokens_blc)
