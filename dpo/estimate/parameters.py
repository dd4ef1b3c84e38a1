"""The parameters of a model by the collective that gathers them, and what of the model has gradients.

Of a model whose weights are all trained, few layers tell of all. Adapters may differ from layer to layer: with them the
whole model is built, without memory, and its body runs once on fake tensors. Autograd then says of each product whether
its input needs a gradient. In a Llama with adapters on q_proj and v_proj alone:

    model.layers.0   q_proj, k_proj, v_proj and A of both adapters read what no adapter has changed: no gradient
                     o_proj, gate_proj, up_proj and down_proj: the gradient of the input alone
    model.layers.1   all products have that gradient, k_proj too
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import inject
from dpo.adapters.names import is_of_adapter
from dpo.adapters.spec import AdapterSpec
from dpo.batch.costs import CostModel, Trained, cost_model
from dpo.batch.layout import attention_windows
from dpo.batch.packing import RowFormat, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.estimate.few_layers import with_layers
from dpo.estimate.traffic import Groups, parameter_groups
from dpo.model.build import build_on_meta
from dpo.model.on_meta import model_of
from dpo.model.parallelize import decoder_layers


def groups_of(config: Config, model_config: PretrainedConfig, num_ranks: int) -> Groups:
    """Returns the groups of parameters that FSDP2 all-gathers together, and what of the model is trained.

    Args:
        config: the run's.
        model_config: the transformers config of the whole model.
        num_ranks: ranks over which the model is sharded and replicated.

    Raises:
        UserError: the model cannot be trained exactly.
    """
    shard = num_ranks // config.parallel.replicate
    adapters = find_adapters(config)
    if adapters is None:
        depth = model_config.num_hidden_layers
        few = with_layers(model_config, min(depth, 2))
        model = build_on_meta(few, getattr(torch, config.model.dtype), config.model.trust_remote_code)
        groups = parameter_groups(model, decoder_layers(model), shard)
        return Groups((groups.layers[-1],) * depth, groups.root)
    model = _of_one_dtype(config, model_config, adapters)
    stored = model_of(config, model_config) if adapters.quantize else model
    groups = parameter_groups(stored, decoder_layers(stored), shard)
    return replace(groups, trained=_trained_of(model, adapters))


# --- what has gradients ----------------------------------------------------------------------------------------------


def trained_of(config: Config, model_config: PretrainedConfig) -> Trained:
    """Returns what of a model has gradients.

    Args:
        config: the run's.
        model_config: the transformers config of the whole model.

    Raises:
        UserError: the model cannot be trained exactly.
    """
    adapters = find_adapters(config)
    return Trained() if adapters is None else _trained_of(_of_one_dtype(config, model_config, adapters), adapters)


def _of_one_dtype(config: Config, model_config: PretrainedConfig, adapters: AdapterSpec) -> PreTrainedModel:
    """Returns the whole model, with its adapters, on the meta device. Its frozen weights have the dtype of the trained
    ones, since no FSDP converts them here, and none is quantized: its products have the same FLOPs.
    """
    dtype = getattr(torch, config.model.dtype)
    model = build_on_meta(model_config, dtype, config.model.trust_remote_code)
    inject(model, replace(adapters, quantize=None), dtype, dtype)
    return model


def _trained_of(model: PreTrainedModel, adapters: AdapterSpec) -> Trained:
    """Returns what of a model with adapters has gradients. The model's tensors become fake ones."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(model)
        return _trained(model, _observed(model), adapters)


def _to_fake(model: nn.Module) -> None:
    """Replaces the tensors of a model on the meta device by fake ones of the CPU, inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty_like(parameter, device="cpu")
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))


@dataclass
class _Found:
    """What a forward pass tells."""

    needs_gradient: dict[str, bool] = field(default_factory=dict)
    """By name of each product, in the order of their last calls: whether its input needs a gradient."""
    num_layers: int = 0
    """Layers whose output needs one."""


def _observed(model: PreTrainedModel) -> _Found:
    """Runs the body of a model on one small tree."""
    ids = np.zeros(4, np.int32)
    trees = [Tree(ids, (ids, ids), ((0, 1),))]
    row_format = RowFormat(attention_windows(model.config), torch.device("cpu"), model.dtype, int)
    batch = pack(trees, plan_step(trees, 1, 12, CostModel()), None, row_format)
    found = _Found()
    with _watched(model, found), torch.enable_grad():
        model.base_model(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], layout=batch.layout, use_cache=False
        )
    return found


@contextmanager
def _watched(model: PreTrainedModel, found: _Found) -> Iterator[None]:
    """Records in `found` what the modules of a model are given and return inside."""

    def see(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            found.needs_gradient[name] = found.needs_gradient.pop(name, False) or inputs[0].requires_grad

        return hook

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        found.num_layers += (output[0] if isinstance(output, tuple) else output).requires_grad

    with ExitStack() as stack:
        for name, module in _products(model):
            stack.callback(module.register_forward_pre_hook(see(name)).remove)
        for layer in decoder_layers(model):
            stack.callback(layer.register_forward_hook(count).remove)
        yield


def _products(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))


def _trained(model: PreTrainedModel, found: _Found, spec: AdapterSpec) -> Trained:
    """Returns what of a model has gradients.

    Args:
        model: the model with adapters.
        found: by a forward pass of it.
        spec: its adapters. The recomputation of a layer stops before the layer's last product, but with DoRA, and but
            where that is a quantized product, which saves its bytes after it has run.
    """
    weights: dict[str, nn.Parameter] = {name: module.weight for name, module in _products(model)}
    adapters = [name for name in found.needs_gradient if is_of_adapter(f"{name}.")]
    unneeded = [name for name, needs in found.needs_gradient.items() if not needs]
    updated = [name for name in found.needs_gradient if weights[name].requires_grad]

    def flops(names: Sequence[str]) -> float:
        return 2.0 * sum(weights[name].numel() for name in names)

    costs, layers, head = cost_model(model.config), decoder_layers(model), model.get_output_embeddings()
    ends = _last_products(model, layers[-found.num_layers :], found)
    spared = [] if spec.dora else [name for name in ends if not spec.quantize or is_of_adapter(f"{name}.")]
    return Trained(
        adapters=flops(adapters) / costs.per_token,
        inputs=1.0 + (flops(adapters) - flops(unneeded)) / costs.per_token,
        weights=flops(updated) / costs.per_token,
        layers=found.num_layers / len(layers),
        head=float(head.weight.requires_grad),
        last=flops(spared) / costs.per_token_last,
    )


def _last_products(model: nn.Module, layers: Sequence[nn.Module], found: _Found) -> list[str]:
    """Returns the name of the last product of each of these decoder layers."""
    places = {name: place for place, name in enumerate(found.needs_gradient)}  # in the order of their calls
    names = {module: name for name, module in model.named_modules()}
    inside = ([names[module] for module in layer.modules() if names[module] in places] for layer in layers)
    return [max(of_layer, key=places.__getitem__) for of_layer in inside]
