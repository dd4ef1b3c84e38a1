"""The model that is trained: built without memory, divided over the mesh, loaded shard by shard, run on packed
trees.
"""

import gc
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from dpo.base.errors import UserError
from dpo.batch.packing import PackedBatch
from dpo.config import Config, ParallelConfig
from dpo.config.rules import decided
from dpo.distributed.world import World, make_mesh
from dpo.model.attention import ATTENTION, Window, register_attention
from dpo.model.kernels import Graphs, keep_kernels
from dpo.model.log_probs import completion_log_probs
from dpo.model.parallelize import compute_dtype, fsdp_modules, is_compiled, parallelize
from dpo.model.weights import load_tensors


@dataclass(frozen=True)
class Policy:
    """A sharded model and what must be known to run it."""

    model: Any
    windows: tuple[Window, ...]
    """The attention windows of its layers."""
    device: torch.device
    dtype: torch.dtype
    """Of the master weights and the log-probabilities."""
    parallel: ParallelConfig
    graphs: Graphs
    """Graphs that its layers have taken so far; empty where they are not compiled."""

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config


# --- built -----------------------------------------------------------------------------------------------------------


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
    return Policy(model, attention_windows(config), device, master, parallel, graphs)


def attention_windows(config: PretrainedConfig) -> tuple[Window, ...]:
    """The distinct attention windows of a model's layers: None is full attention."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return tuple({window if kind == "sliding_attention" else None for kind in kinds})


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
        raise UserError(_unsupported(config, "their attention cannot be replaced")) from failure
    _check_structure(model)
    # Taken before fully_shard, which renames the class by which transformers looks the conversions up.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.logps = types.MethodType(_forward_logps, model)
    # It looks for padding at the row's ends, for which the host would wait in every forward pass.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *args: None
    _switch_dropout_off(model)
    return model.train()  # activation checkpointing works in training mode alone; dropout is off all the same


def _check_structure(model: PreTrainedModel) -> None:
    """Raises UserError where log-probabilities would silently be others than the model's own."""
    body_and_head = {model.base_model, model.get_output_embeddings()}
    for applies, reason in (
        (not model._supports_attention_backend, "their attention cannot be replaced"),
        (set(model.children()) != body_and_head, "there is more than one linear layer between the body and the logits"),
    ):
        if applies:
            raise UserError(_unsupported(model.config, reason))


def _unsupported(config: PretrainedConfig, reason: str) -> str:
    return f"model.path: {config.model_type} models are not supported: {reason}"


def _switch_dropout_off(model: nn.Module) -> None:
    """Also where a model keeps the probability as a number, as OPT does (`dropout`, `layerdrop`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


# --- loaded and exported ---------------------------------------------------------------------------------------------


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


def free_memory() -> None:
    """Frees models that nobody holds any more: a sharded one refers to itself, and would wait for a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_weights(policy: Policy, folder: Path) -> None:
    """Reads the weights of a Hugging Face folder; each rank reads its shards alone. Every rank must get here."""
    load_tensors(folder, stored_tensors(policy), policy.model.base_model_prefix)
    wrong = [name for name, p in policy.model.named_parameters() if p.dtype != policy.dtype]
    assert not wrong, f"master weights must be {policy.dtype}: {wrong[:3]}"


def stored_tensors(policy: Policy) -> dict[str, Tensor]:
    """The model's tensors under the names of its Hugging Face folder, tied ones once."""
    tied = set(policy.model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in policy.model.state_dict().items() if name not in tied}
    return revert_weight_conversion(policy.model, state)


# --- run -------------------------------------------------------------------------------------------------------------


def completion_logps(policy: Policy, batch: PackedBatch, head_bytes: int) -> Tensor:
    """Log-probability of each completion of the batch given its prompt, (B,) nats, with gradient where enabled.

    Every rank must get here the same number of times: the parameters are gathered on the way.
    """
    return policy.model.logps(batch, head_bytes, policy.device.type)


def _forward_logps(
    model: PreTrainedModel, batch: PackedBatch, head_bytes: int, device_type: str | None = None
) -> Tensor:
    """Runs inside the root's FSDP forward, where the head's weights are whole; only rows that predict meet the head."""
    hidden = model.base_model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        layout=batch.layout,
        use_cache=False,
    ).last_hidden_state[0]
    head = model.get_output_embeddings()
    return completion_log_probs(
        hidden[batch.rows], head.weight, head.bias, batch.targets, batch.lengths, head_bytes, device_type
    )


def announce_backward(policy: Policy, is_last: bool) -> None:
    """Says whether the coming backward pass reduces gradients over ranks (on every micro-batch, or on the last alone)
    and whether parameters stay whole after it (up to the last, where they outlive the forward pass).
    """
    reduces = is_last or policy.parallel.sync_gradients == "every_micro_batch"
    policy.model.set_requires_gradient_sync(reduces)
    policy.model.set_reshard_after_backward(is_last or policy.parallel.reshard_after_forward)
    # What was reduced over copies (HSDP) would else stay beside the next micro-batch's activations.
    policy.model.set_is_last_backward(reduces)


def reshard(policy: Policy) -> None:
    """Frees whole parameters that a pass without gradients left behind: they would outlive a change of the weights."""
    for module in fsdp_modules(policy.model):
        module.reshard()
