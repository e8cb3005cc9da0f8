"""LoRAs of peft on both weight layouts against the reference, merged and beside the weights. Kind `lora`."""

import jax
import pytest

from convert import lora as conversion
from osjax import adapters
from osjax.kernels.attention_ref import reference_attention
from osjax.models import lora
from osjax.models.rope import rope_table
from tests import peft_folder
from tests.parity import cases
from tests.parity.test_mmdit import build, inputs

SCALE = "output.scale_"


@pytest.fixture(scope="module", params=cases.of_kind("lora"), ids=cases.case_id)
def converted(request, tmp_path_factory):
    """The case, its model's case, and the adapter after its way over the disk."""
    case, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    (role,) = case.manifest["weights_from"]
    base = case.weights_case(role)
    tensors = {name.removeprefix("adapter."): tensor for name, tensor in case.inputs.items()}
    peft_folder.write(folder / "peft", tensors, case.manifest["adapter_config"], base.config)
    conversion.write(conversion.prepare(folder / "peft" / "adapter_model.safetensors"), folder / "lora")
    return case, base, adapters.load(adapters.read(folder / "lora"))


@pytest.mark.parametrize("use", [lora.attach, lora.merge], ids=lambda use: use.__name__)
def test_output_at_every_scale(converted, use):
    case, base, adapter = converted
    model = build(base)
    rope = rope_table(base.inputs["img_ids"], model.config.axes_dim, model.config.theta)
    given = inputs(base)

    @jax.jit
    def output(weight):
        return use(model, lora.stack([(adapter, weight)]))(**given, rope=rope, attention=reference_attention)

    scales = [name for name in case.outputs if name.startswith(SCALE)]
    assert scales
    for name in scales:
        cases.assert_close(output(float(name.removeprefix(SCALE))), case.outputs[name], what=name)
