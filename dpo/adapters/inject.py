"""Puts adapters into a model on the meta device, and freezes its other weights."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from dpo.adapters.names import is_of_adapter
from dpo.adapters.quantized import quantize_layers
from dpo.adapters.spec import ADAPTER, AdapterSpec, peft_config
from dpo.adapters.targets import find_targets
from dpo.base.errors import UserError


def inject(model: PreTrainedModel, spec: AdapterSpec, master: torch.dtype, compute: torch.dtype) -> None:
    """Puts adapters into a model, whose weights are frozen but for `spec.trained_modules`.

    What is trained is stored in `master`. What is frozen is stored in `compute`, in which the forward pass would
    convert it anyway; with `spec.quantize` its linear layers are quantized.

    Args:
        model: on the meta device, before it is sharded; modified in place.
        spec: the adapters.
        master: the dtype of the weights that the optimizer updates.
        compute: the dtype of the forward pass.

    Raises:
        UserError: no layer of the model has the name of a target, or one of them can get no adapter.
    """
    if spec.rank:
        _add_adapters(model, spec)
    trained = _trained_whole(model, spec)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_adapter(name) or parameter in trained)
    if spec.quantize:
        quantize_layers(model, spec, compute)
    _convert(model, master, compute)


def _add_adapters(model: PreTrainedModel, spec: AdapterSpec) -> None:
    from peft import inject_adapter_in_model

    config = peft_config(spec, find_targets(model, spec))
    # peft moves new modules to a device, which modules of fake tensors, as `dpo.estimate` builds them, cannot do.
    with unset_fake_temporarily(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a Conv1D's weight is transposed, which peft sees by itself
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        except (ValueError, TypeError, NotImplementedError) as failure:
            raise UserError("lora", f"peft cannot adapt this model: {failure}") from failure


def _trained_whole(model: PreTrainedModel, spec: AdapterSpec) -> set[nn.Parameter]:
    """Returns the parameters that are trained beside the adapters: of embeddings and head, and of named modules."""
    named: dict[str, nn.Module] = {}
    for word in spec.trained_modules:
        found = {name: module for name, module in model.named_modules() if name.endswith(word)}  # as peft finds them
        if not found:
            raise UserError("lora.path", f"modules_to_save names {word!r}, and the model has no such module")
        named |= found
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if spec.embeddings else []
    return {parameter for module in (*named.values(), *ends) for parameter in module.parameters()}


def _convert(model: PreTrainedModel, master: torch.dtype, compute: torch.dtype) -> None:
    """Replaces the parameters by parameters of the dtypes in which they are stored; tied ones stay tied."""
    made = dict[nn.Parameter, nn.Parameter]()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter not in made:
                dtype = master if parameter.requires_grad else compute
                made[parameter] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            setattr(module, name, made.get(parameter, parameter))


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Returns the parameters that the optimizer updates."""
    return [parameter for parameter in parameters if parameter.requires_grad]
