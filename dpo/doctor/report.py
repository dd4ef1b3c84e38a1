"""Gathers the measurements of all parts into the report of `--report FILE` (`dpo/estimate/report.py`).

Every field is filled from numbers and from words of fixed lists. Texts of the machine are taken in two places alone:
versions, of which `plain_version` leaves the number, and names of devices.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from transformers import PretrainedConfig

from dpo.batch.costs import intermediate_size
from dpo.config import Config
from dpo.distributed.world import World
from dpo.doctor.attention import ATTENTION
from dpo.doctor.host import DEVICES, TOOLCHAIN, VERSIONS
from dpo.doctor.parts import Failure, Subject
from dpo.doctor.rates import RATES
from dpo.doctor.step_facts import step_facts, update_facts
from dpo.doctor.steps import STEPS
from dpo.doctor.storage import FILE_BYTES, STORAGE
from dpo.estimate import report as fields
from dpo.estimate.lengths import Lengths
from dpo.estimate.report_file import plain_version
from dpo.model.parallelize import is_compiled

Results = Mapping[str, Sequence[Any]]
"""The results of each part, by its name: one by rank, a Failure where it failed."""


def make_report(subject: Subject, world: World, num_nodes: int, results: Results) -> fields.Report:
    """Returns the report of the parts that have results so far; called on rank 0.

    Args:
        subject: the config, its model and its lengths.
        world: the ranks.
        num_nodes: nodes of the ranks.
        results: the results by part.
    """
    assert subject.config is not None and subject.lengths is not None
    done = {name: found for name, found in results.items() if not any(isinstance(one, Failure) for one in found)}
    failed = [name for name in get_args(fields.PartName) if name in results and name not in done]
    timed = done.get(STEPS.name)
    outcome = _outcome(results)
    return fields.Report(
        format=fields.FORMAT,
        version=fields.VERSION,
        failed=failed,
        versions=_versions(done),
        ranks=fields.Ranks(_device_type(world), world.size, num_nodes, world.local_size),
        devices=_devices(done),
        products=_products(done),
        collectives=_collectives(done),
        storage=_storage(done),
        host_copies=_host_copies(done),
        attention=_attention(done),
        model=_model(subject.models[0], subject.sizes.num_parameters if subject.sizes else 0),
        layout=_layout(timed[0].config, world) if timed else None,
        lengths=_lengths(subject.lengths),
        outcome=outcome,
        steps=step_facts(subject, world, timed or (), done.get(RATES.name, ())) if outcome == "measured" else None,
        updates=update_facts(timed or ()),
    )


def _device_type(world: World) -> Any:
    return world.device.type


def _outcome(results: Results) -> fields.Outcome:
    """Returns the outcome of the steps: of several ranks the worst."""
    ranks = results.get(STEPS.name)
    if ranks is None:
        return "not_finished"
    if any(isinstance(rank, Failure) for rank in ranks):
        return "failed"
    order: tuple[fields.Outcome, ...] = ("does_not_fit", "out_of_memory", "measured")
    return next(outcome for outcome in order if any(rank.outcome == outcome for rank in ranks))


# --- the machine -----------------------------------------------------------------------------------------------------


def _versions(done: Results) -> fields.Versions | None:
    if VERSIONS.name not in done:
        return None
    first = {name: plain_version(text) for name, text in done[VERSIONS.name][0].items() if name != "host"}
    driver = done[TOOLCHAIN.name][0].facts.driver if TOOLCHAIN.name in done else None
    return fields.Versions(
        python=first["Python"],
        torch=first["torch"],
        transformers=first["transformers"],
        triton=_if_known(first["triton"]),
        nccl=_if_known(first.get("NCCL", "")),
        driver=_if_known(plain_version(driver or "")),
        cuda=_if_known(plain_version(torch.version.cuda or "")),
    )


def _if_known(version: str) -> str | None:
    return None if version in ("", "unknown") else version


def _devices(done: Results) -> list[fields.Device]:
    """Returns one entry per kind of device."""
    kinds = defaultdict(list)
    for device in done.get(DEVICES.name, ()):
        kinds[device.hardware, device.capability, device.threads].append(device)
    return [
        fields.Device(
            name=name,
            capability=capability,
            count=len(devices),
            memory_bytes=min(device.total for device in devices),
            free_bytes=min(device.free for device in devices),
            threads_per_rank=threads,
        )
        for (name, capability, threads), devices in kinds.items()
    ]


def _products(done: Results) -> list[fields.Products]:
    ranks = done.get(RATES.name, ())
    precisions: Iterable[Any] = ranks[0].products if ranks else ()
    return [fields.Products(precision, [rank.products[precision] for rank in ranks]) for precision in precisions]


def _collectives(done: Results) -> list[fields.Collective]:
    ranks = done.get(RATES.name, ())
    return [
        fields.Collective(
            kind=of_ranks[0].kind,
            axis=of_ranks[0].axis,
            ranks=of_ranks[0].size,
            spans_nodes=any(one.spans_nodes for one in of_ranks),
            tensor_bytes=of_ranks[0].num_bytes,
            seconds=[one.seconds for one in of_ranks],
        )
        for of_ranks in zip(*(rank.collectives for rank in ranks), strict=True)
    ]


def _storage(done: Results) -> fields.Storage | None:
    ranks = done.get(STORAGE.name)
    if not ranks:
        return None
    return fields.Storage(
        bytes_per_rank=FILE_BYTES,
        write_seconds=[rank.write_seconds for rank in ranks],
        read_seconds=[rank.read_seconds for rank in ranks],
        free_bytes=min(rank.free for rank in ranks),
        total_bytes=min(rank.total for rank in ranks),
    )


def _host_copies(done: Results) -> fields.HostCopies | None:
    copies = [rank.copies for rank in done.get(RATES.name, ()) if rank.copies]
    return fields.HostCopies([to_host for to_host, _ in copies], [back for _, back in copies]) if copies else None


def _attention(done: Results) -> fields.Attention | None:
    """Returns the errors of attention; None where any is not finite, which is a problem of the examination."""
    ranks = done.get(ATTENTION.name)
    if not ranks or not all(np.isfinite(rank.error) for rank in ranks):
        return None
    errors, seconds = ([getattr(rank, name) for rank in ranks] for name in ("error", "seconds"))
    return fields.Attention(ranks[0].path, ranks[0].precision, errors, seconds)


# --- the config ------------------------------------------------------------------------------------------------------


def _model(model_config: PretrainedConfig, num_parameters: int) -> fields.Model:
    """Returns the sizes of a model; the name of an architecture that came with the model is left out."""
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads
    is_own = type(model_config).__module__.startswith("transformers.models.")
    return fields.Model(
        family=model_config.model_type if is_own else "other",
        parameters=num_parameters,
        layers=model_config.num_hidden_layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
        intermediate_size=intermediate_size(model_config),
        vocab_size=model_config.vocab_size,
    )


def _layout(config: Config, world: World) -> fields.Layout:
    parallel: Any = config.parallel  # whose words were checked when the config was read, and are once more when written
    return fields.Layout(
        shard=world.size // parallel.replicate,
        replicate=parallel.replicate,
        master_dtype=config.model.dtype,
        compute_dtype=parallel.compute_dtype,
        tf32=parallel.tf32,
        reduce_dtype=parallel.reduce_dtype,
        activation_checkpointing=parallel.activation_checkpointing,
        reshard_after_forward=parallel.reshard_after_forward,
        sync_gradients=parallel.sync_gradients,
        cpu_offload=parallel.cpu_offload,
        compile=is_compiled(parallel, world.device),
        head_memory_mib=parallel.head_memory_mib,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        pairs_per_step=config.batch.pairs_per_step,
        optimizer=config.optim.name,
        momentum=config.optim.momentum > 0,
    )


def _lengths(lengths: Lengths) -> fields.Lengths:
    steps = lengths.steps
    trees = [tree for step in steps for tree in step]
    return fields.Lengths(
        source="data" if lengths.extent else "assumed",
        steps=len(steps),
        tokens_per_step=_percentiles([sum(tree.num_tokens for tree in step) for step in steps]),
        trees_per_step=_percentiles([len(step) for step in steps]),
        completions_per_step=_percentiles([sum(len(tree.completion_ids) for tree in step) for step in steps]),
        prompt_tokens=_percentiles([len(tree.prompt_ids) for tree in trees]),
        completion_tokens=_percentiles([len(ids) for tree in trees for ids in tree.completion_ids]),
    )


def _percentiles(numbers: Sequence[int]) -> fields.Percentiles:
    return fields.Percentiles(*(float(value) for value in np.percentile(numbers, (0, 50, 90, 99, 100))))
