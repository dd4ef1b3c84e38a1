"""A model folder -> a sharded policy: built on the meta device, checked, sharded, loaded."""

import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from dpo.adapters.inject import inject
from dpo.adapters.merge import merged_weights
from dpo.adapters.quantized import quantized_layers
from dpo.adapters.spec import AdapterSpec
from dpo.adapters.start import check_adapters, read_adapters, start_adapters
from dpo.base.errors import UserError
from dpo.batch.layout import attention_windows
from dpo.config import Config, ParallelConfig
from dpo.config.rules import decided
from dpo.distributed.world import World, make_mesh
from dpo.model.attention import ATTENTION, register_attention
from dpo.model.kernels import keep_kernels
from dpo.model.matching import Names, base_state, names_of
from dpo.model.model_config import is_untied, meta_model
from dpo.model.parallelize import compute_dtype, is_compiled, parallelize
from dpo.model.policy import Policy, _forward_logps, reshard
from dpo.model.weights import index_findings, load_tensors
from dpo.terminal.console import warn


def build_policy(
    config: PretrainedConfig,
    parallel: ParallelConfig,
    dtype: str,
    mesh: DeviceMesh,
    trust_remote_code: bool = False,
    adapters: AdapterSpec | None = None,
) -> Policy:
    """Returns a policy sharded over the mesh, whose weights are not yet read (see `load_weights`).

    No rank ever holds all parameters. Where `activation_checkpointing` or `sync_gradients` is auto, `decided` chooses;
    `dpo.train` chooses before it builds.

    Args:
        config: the transformers config of the model.
        parallel: how the model is sharded, checkpointed and compiled.
        dtype: the dtype of the master weights, float32 or float64.
        mesh: the ranks over which parameters are sharded.
        trust_remote_code: whether a model's own code may run.
        adapters: what is trained in place of the model's weights; None: all weights are.

    Raises:
        UserError: the model cannot be trained exactly.
    """
    parallel = decided(parallel)
    on_cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    master = getattr(torch, dtype)
    if on_cuda:
        torch.set_float32_matmul_precision("high" if parallel.tf32 else "highest")  # for the whole process
    if on_cuda or is_compiled(parallel, device):
        keep_kernels()
    model, compute = build_on_meta(config, master, trust_remote_code), compute_dtype(parallel, master, device)
    if adapters:
        inject(model, adapters, master, compute)
    graphs = parallelize(model, mesh, parallel, compute)
    _materialize(model, torch.device("cpu") if parallel.cpu_offload else device, device)
    head_bytes = parallel.head_memory_mib * 2**20
    return Policy(model, attention_windows(config), device, master, parallel, head_bytes, graphs, adapters)


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Returns the whole model on the meta device, with this trainer's attention and without dropout.

    Args:
        config: the transformers config of the model.
        dtype: the dtype of the master weights.
        trust_remote_code: whether a model's own code may run.

    Raises:
        UserError: the model cannot be trained exactly.
    """
    register_attention()
    try:
        model: Any = meta_model(config, trust_remote_code, dtype=dtype, attn_implementation=ATTENTION)
    except KeyError as failure:
        raise _unsupported(config, "their attention cannot be replaced") from failure
    _check_structure(model)
    # Before fully_shard, which renames the class by which transformers looks up the conversions.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.logps = types.MethodType(_forward_logps, model)
    # The original looks for padding at both ends of the row, for which the host would wait in every forward pass.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *args: None
    _switch_dropout_off(model)
    model.train()  # activation checkpointing needs training mode; dropout is off in it too
    built: PreTrainedModel = model
    return built


def _check_structure(model: PreTrainedModel) -> None:
    """Raises UserError where the log-probabilities would silently differ from the model's own."""
    body_and_head = {model.base_model, model.get_output_embeddings()}
    for applies, reason in (
        (not model._supports_attention_backend, "their attention cannot be replaced"),
        (set(model.children()) != body_and_head, "there is more than one linear layer between the body and the logits"),
    ):
        if applies:
            raise _unsupported(model.config, reason)


def _unsupported(config: PretrainedConfig, reason: str) -> UserError:
    """Returns the error for a model that is refused."""
    return UserError("model.path", f"{config.model_type} models are not supported: {reason}")


def _switch_dropout_off(model: nn.Module) -> None:
    """Sets all dropout probabilities to 0, also those that a model keeps as plain attributes, as OPT does (`dropout`,
    `layerdrop`).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def _materialize(model: PreTrainedModel, device: torch.device, compute_device: torch.device) -> None:
    """Allocates the sharded parameters on `device`, and computes the buffers that no checkpoint stores (RoPE's
    frequencies) on `compute_device`: CPU offloading keeps parameters on the host, but not buffers.
    """
    model.to_empty(device=device)
    model.tie_weights()
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(compute_device))
    for layer in quantized_layers(model).values():
        layer.fill_pairs()


def load_policy(
    config: Config,
    world: World,
    model_config: PretrainedConfig,
    folder: Path,
    adapters: AdapterSpec | None = None,
) -> Policy:
    """Returns a sharded policy with the weights of a folder, whose adapters, if any, change nothing yet (see
    `read_start`). Every rank must get here, or the rest hang.

    Args:
        config: gives the dtype of the master weights and how the model is sharded.
        world: the ranks, after `start_devices`.
        model_config: the transformers config of the model.
        folder: a Hugging Face folder with the weights of this model.
        adapters: what is trained in place of the model's weights; None: all weights are.

    Returns:
        The policy, sharded; each rank has read its own shards.

    Raises:
        UserError: the model cannot be trained exactly, or the folder lacks weights of it.
    """
    mesh = make_mesh(world, config.parallel)
    trust = config.model.trust_remote_code
    policy = build_policy(model_config, config.parallel, config.model.dtype, mesh, trust, adapters)
    load_weights(policy, folder)
    if adapters:
        start_adapters(policy.model, config.train.seed)
        if adapters.folder:
            check_adapters(policy.model, adapters.folder)  # before hours of the reference pass
    return policy


def read_start(policy: Policy) -> None:
    """Reads the adapters with which a policy starts, where they have a folder. Every rank must get here, or the rest
    hang.
    """
    if policy.adapters and policy.adapters.folder:
        reshard(policy)  # a forward pass before leaves parameters unsharded, which are not those that are kept
        read_adapters(policy.model, policy.adapters.folder)


def load_weights(policy: Policy, folder: Path) -> None:
    """Reads the weights of a Hugging Face folder; each rank reads its own shards. Rank 0 warns of tensors for which the
    model has no place. Every rank must get here, or the rest hang.
    """
    names, state = names_of(policy.model), base_state(policy.model)
    quantized = {state[name]: layer for name, layer in quantized_layers(policy.model).items()}
    unused = load_tensors(folder, _by_stored_names(policy, state), names, quantized)
    if dist.get_rank() == 0:
        for line in _findings(folder, policy.model.config, names, unused):
            warn(line)
    wrong = [name for name, p in policy.model.named_parameters() if p.requires_grad and p.dtype != policy.dtype]
    assert not wrong, f"master weights must be {policy.dtype}: {wrong[:3]}"


def _findings(folder: Path, config: PretrainedConfig, names: Names, unused: Sequence[str]) -> Iterator[str]:
    """Yields a line per way in which config.json does not describe the tensors of its folder.

    Args:
        folder: the model folder.
        config: the config of the model as built.
        names: the names of its tensors.
        unused: names of tensors for which the model has no place.
    """
    if unused:
        left_out = "are neither trained nor exported" if len(unused) > 1 else "is neither trained nor exported"
        count = f"{len(unused)} tensors" if len(unused) > 1 else "1 tensor"
        yield f"{folder}: {count} for which a {names.model} has no place {left_out}, the first is {unused[0]}"
    yield from index_findings(folder)
    if is_untied(folder, config):
        (head, embedding), *_ = names.tieable.items()
        says = f"{folder}: config.json says tie_word_embeddings: true, but {head} differs from {embedding}"
        yield f"{says}; both are kept, as transformers loads them, and an export says tie_word_embeddings: false"


def stored_tensors(policy: Policy) -> dict[str, Tensor]:
    """Returns the model's tensors, without adapters, by their names in its Hugging Face folder; tied tensors once."""
    return _by_stored_names(policy, base_state(policy.model))


def merged_tensors(policy: Policy) -> dict[str, Tensor]:
    """Returns the same with adapters added to the weights that they adapt, and quantized weights dequantized. Sums take
    the place of the policy's own weights, which it cannot run with any more: a copy of all might not fit. Every rank
    must get here.
    """
    state, quantized = base_state(policy.model), quantized_layers(policy.model)
    for name, merged in merged_weights(policy.model, policy.dtype):
        if quantized.pop(name, None) is None and state[name].dtype == merged.dtype:
            state[name].copy_(merged)
        else:
            state[name] = merged
    return _by_stored_names(policy, state | {name: layer.weight for name, layer in quantized.items()})


def _by_stored_names(policy: Policy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tied = set(policy.model.all_tied_weights_keys)
    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    stored: dict[str, Tensor] = revert_weight_conversion(policy.model, kept)
    return stored
