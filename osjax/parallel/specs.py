"""Every PartitionSpec, named by what it shards. Nothing outside `osjax/parallel` writes a mesh axis name."""

from __future__ import annotations

import dataclasses

from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Specs:
    """How arrays lie over the mesh; dims as in `osjax/models/mmdit.py`, K guidance branches in front."""

    tokens_bnc: P = P("data", "seq", None)
    tokens_bn: P = P("data", "seq")
    branch_tokens_kbnc: P = P(None, "data", "seq", None)
    branch_rows_kbc: P = P(None, "data", None)
    rows_b: P = P("data")
    rows_bc: P = P("data", None)
    rope_1nd: P = P(None, "seq", None)
    token_weights_kn: P = P(None, "seq")
    everywhere: P = P()

    data_axis: str = "data"
    seq_axis: str = "seq"


SPECS = Specs()

# Training: rows of a batch, whatever dims follow. Weights have a table of their own, `osjax/parallel/weights.py`.
TRAINING_ROWS = P(("data", "fsdp"))
