"""A model folder -> a sharded policy: built on meta, checked, sharded, loaded."""

import types
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from dpo.base.errors import UserError
from dpo.batch.layout import attention_windows
from dpo.config import Config, ParallelConfig
from dpo.config.rules import decided
from dpo.distributed.world import World, make_mesh
from dpo.model.attention import ATTENTION, register_attention
from dpo.model.kernels import keep_kernels
from dpo.model.parallelize import compute_dtype, is_compiled, parallelize
from dpo.model.policy import Policy, _forward_logps
from dpo.model.weights import load_tensors


def build_policy(
    config: PretrainedConfig, parallel: ParallelConfig, dtype: str, mesh: DeviceMesh, trust_remote_code: bool = False
) -> Policy:
    """A model divided over the mesh, its weights not yet read: see `load_weights`. No rank ever holds all of it.

    Where activation_checkpointing or sync_gradients are auto they are `decided`; `dpo.train` decides before it builds.
    """
    parallel = decided(parallel)
    on_cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    master = getattr(torch, dtype)
    if on_cuda:
        torch.set_float32_matmul_precision("high" if parallel.tf32 else "highest")  # of the whole process
    if on_cuda or is_compiled(parallel, device):
        keep_kernels()
    model = build_on_meta(config, master, trust_remote_code)
    graphs = parallelize(model, mesh, parallel, compute_dtype(parallel, master, device))
    _materialize(model, torch.device("cpu") if parallel.cpu_offload else device, device)
    head_bytes = parallel.head_memory_mib * 2**20
    return Policy(model, attention_windows(config), device, master, parallel, head_bytes, graphs)


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The whole model without memory, with this trainer's attention and no dropout. Raises UserError where it cannot be
    trained exactly.
    """
    register_attention()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=trust_remote_code
            )
    except KeyError as failure:
        if failure.args != (ATTENTION,):
            raise
        raise _unsupported(config, "their attention cannot be replaced") from failure
    _check_structure(model)
    # Taken before fully_shard, which renames the class by which transformers looks the conversions up.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.logps = types.MethodType(_forward_logps, model)
    # It looks for padding at the row's ends, for which the host would wait in every forward pass.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *args: None
    _switch_dropout_off(model)
    model.train()  # activation checkpointing works in training mode alone; dropout is off all the same
    built: PreTrainedModel = model
    return built


def _check_structure(model: PreTrainedModel) -> None:
    """Raises UserError where log-probabilities would silently be others than the model's own."""
    body_and_head = {model.base_model, model.get_output_embeddings()}
    for applies, reason in (
        (not model._supports_attention_backend, "their attention cannot be replaced"),
        (set(model.children()) != body_and_head, "there is more than one linear layer between the body and the logits"),
    ):
        if applies:
            raise _unsupported(model.config, reason)


def _unsupported(config: PretrainedConfig, reason: str) -> UserError:
    return UserError("model.path", f"{config.model_type} models are not supported: {reason}")


def _switch_dropout_off(model: nn.Module) -> None:
    """Also where a model keeps the probability as a number, as OPT does (`dropout`, `layerdrop`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def _materialize(model: PreTrainedModel, device: torch.device, compute_device: torch.device) -> None:
    """Gives the sharded parameters memory on `device`; computes again the buffers that no checkpoint stores (RoPE's
    frequencies), which lie where the model runs: offloading keeps parameters alone on the host.
    """
    model.to_empty(device=device)
    model.tie_weights()
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(compute_device))


def load_policy(config: Config, world: World, model_config: PretrainedConfig, folder: Path) -> Policy:
    """A sharded policy with the weights of a folder. Every rank must get here."""
    mesh = make_mesh(world, config.parallel)
    policy = build_policy(model_config, config.parallel, config.model.dtype, mesh, config.model.trust_remote_code)
    load_weights(policy, folder)
    return policy


def load_weights(policy: Policy, folder: Path) -> None:
    """Reads the weights of a Hugging Face folder; each rank reads its shards alone. Every rank must get here."""
    load_tensors(folder, stored_tensors(policy), policy.model.base_model_prefix)
    wrong = [name for name, p in policy.model.named_parameters() if p.dtype != policy.dtype]
    assert not wrong, f"master weights must be {policy.dtype}: {wrong[:3]}"


def stored_tensors(policy: Policy) -> dict[str, Tensor]:
    """The model's tensors under the names of its Hugging Face folder, tied ones once."""
    tied = set(policy.model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in policy.model.state_dict().items() if name not in tied}
    stored: dict[str, Tensor] = revert_weight_conversion(policy.model, state)
    return stored
