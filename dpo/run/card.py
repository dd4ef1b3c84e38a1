"""The model card of an exported model, README.md of its folder: how it was trained, on what, with which result.

Everything comes from files (`card_facts.py`): the run's config, provenance.json and metrics.jsonl, the folder of the
base, and the exported folder itself. What they do not tell is left out. The card has two parts: the front matter, which
the hub reads, and a text in Markdown.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo.board.words import PAIR_METRICS
from dpo.config import Config, LossConfig, OptimConfig
from dpo.run.card_adapters import adapter_words, words_of
from dpo.run.card_facts import Base, CardFacts, read_base, read_exported, read_facts, short_name

PAPER = "https://arxiv.org/abs/2305.18290"
CITATION = """@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning and
               Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""
PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "python")
RESULTS = ("loss", "rewards/accuracies", "rewards/margins")
"""The metrics of the card's table by their names in metrics.jsonl, without `eval/` or `train/`."""


def model_card(config: Config, step: int, base: Path, exported: Path) -> str:
    """Returns the card of an exported model.

    Args:
        config: the run's config.
        step: the updates after which the model was exported.
        base: the folder of the model from which the policy started.
        exported: the exported folder, but for its card.

    Raises:
        RunError: the run's metrics are damaged.
        OSError: a file cannot be read.
    """
    return card_text(read_facts(config, step, base, exported))


def merged_card(config: Config, adapters: Path, base: Path, exported: Path) -> str:
    """Returns the card of a model to whose weights a folder of adapters was added, of whose run nothing is known.

    Args:
        config: names the base and, by its run folder, the model.
        adapters: the folder of the adapters.
        base: the folder of their base.
        exported: the exported folder, but for its card.
    """
    facts = CardFacts(config, 0, read_base(config.model.path, base), read_exported(exported, base), {}, [])
    words = words_of(read_exported(adapters, base).adapters or {})
    name = short_name(str(adapters.absolute()))
    text = [_title(config), "", f"This model is {_named(facts.base)} with LoRA adapters added to its"]
    text += [f"weights: those of `{name}` ({words}).", "", *_usage(facts)]
    return _with_front_matter(front_matter(facts) | {"tags": ["lora"]}, "\n".join(text))


def card_text(facts: CardFacts) -> str:
    """Returns the model card."""
    parts = (_introduction(facts), _training(facts), _data(facts), _result(facts), _usage(facts), _versions(facts))
    body = "\n\n".join("\n".join(part) for part in map(list, (*parts, _citation())) if part)
    return _with_front_matter(front_matter(facts), body)


def _with_front_matter(keys: Mapping[str, Any], body: str) -> str:
    head = yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body}\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Returns the keys that the hub reads."""
    is_whole = facts.exported.adapters is None
    relation = "finetune" if is_whole else "adapter"
    base = {"base_model": facts.base.hub_id, "base_model_relation": relation} if facts.base.hub_id else {}
    datasets = list(dict.fromkeys(source["path"] for source in _sources(facts) if source.get("hub")))
    return {
        **base,
        "library_name": "transformers" if is_whole else "peft",
        "pipeline_tag": "text-generation",
        **facts.base.licence,
        **({"datasets": datasets} if datasets else {}),
        "tags": [*_tags(facts.config.loss), *(["lora"] if adapter_words(facts) else [])],
    }


def _tags(loss: LossConfig) -> list[str]:
    if not loss.facts.compares:
        return ["sft", "generated_from_trainer"]
    return list(dict.fromkeys([loss.name, "dpo", "preference-optimization", "rlhf", "generated_from_trainer"]))


# --- the text --------------------------------------------------------------------------------------------------------


def _introduction(facts: CardFacts) -> Iterator[str]:
    loss = facts.config.loss
    way = f"by Direct Preference Optimization ([Rafailov et al., 2023]({PAPER}))"
    if loss.name != "dpo":
        way = f"with the loss `{loss.name}` of the trainer dpo"
    yield _title(facts.config)
    yield ""
    if facts.exported.adapters is not None:
        yield f"These are LoRA adapters for {_named(facts.base)}, trained {way}."
    elif adapter_words(facts):
        yield f"This model is {_named(facts.base)} with LoRA adapters added to its weights, which were trained {way}."
    else:
        yield f"This model is {_named(facts.base)}, trained {way}."


def _title(config: Config) -> str:
    return f"# {Path(str(config.train.run_dir)).name}"


def _training(facts: CardFacts) -> Iterator[str]:
    config = facts.config
    yield from ("## Training", "")
    yield from _table(("", ""))
    yield _row("base", _named(facts.base))
    if words := adapter_words(facts):
        yield _row("adapters", words)
    if config.loss.facts.uses_reference:
        yield _row("reference", _reference_words(config))
    yield _row("loss", _loss_words(config.loss))
    yield _row("optimizer", f"{config.optim.name}, learning rate {config.optim.lr:g}, {_schedule(config.optim)}")
    yield _row("steps", f"{facts.step:,}, each of {config.batch.pairs_per_step} pairs, seed {config.train.seed}")
    limits = (("max_length", config.data.max_length), ("max_prompt_length", config.data.max_prompt_length))
    yield _row("tokens", ", ".join(f"{name} {'no limit' if limit is None else limit}" for name, limit in limits))


def _reference_words(config: Config) -> str:
    if config.reference.path is not None:
        return f"`{short_name(config.reference.path)}`"
    is_start = config.lora.path is not None and config.reference.adapter == "start"
    return f"the base with the adapters of `{short_name(str(config.lora.path))}`" if is_start else "the base"


def _loss_words(loss: LossConfig) -> str:
    facts = loss.facts
    settings = {
        "beta": loss.beta if facts.compares else None,
        "label_smoothing": loss.label_smoothing or None,
        "sft_weight": loss.sft_weight or None,
        **({facts.own_key: getattr(loss, facts.own_key)} if facts.own_key else {}),
    }
    words = [loss.name, *(f"{name} {value:g}" for name, value in settings.items() if value is not None)]
    return ", ".join([*words, "length_normalized"] if loss.length_normalized else words)


def _schedule(optim: OptimConfig) -> str:
    is_share = isinstance(optim.warmup_steps, float)
    span = f"{optim.warmup_steps:.0%} of the steps" if is_share else f"{optim.warmup_steps} steps"
    warmup = f"warm-up over {span}" if optim.warmup_steps else "no warm-up"
    if optim.schedule == "constant":
        return f"{warmup}, then constant"
    return f"{warmup}, then {optim.schedule} to {optim.min_lr_ratio:g} of it"


def _data(facts: CardFacts) -> Iterator[str]:
    counts = facts.origin.get("data", {})
    if not counts:
        return
    yield from ("## Data", "")
    yield from _table(("source", "for", "pairs kept", "pairs dropped", "pairs held out"))
    for source in counts["sources"]:
        drops = ", ".join(f"{count:,} {reason}" for reason, count in source["dropped"].items()) or "0"
        use = "training" if source["key"].startswith("data.train") else "evaluation"
        name = _linked(source["path"], "datasets/") if source["hub"] else f"`{short_name(source['path'])}`"
        yield _row(name, use, f"{source['pairs']:,}", drops, f"{source['held_out_pairs']:,}")
    yield ""
    yield f"An epoch has {counts['train_pairs']:,} pairs; {counts['eval_pairs']:,} pairs are evaluated."


def _sources(facts: CardFacts) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = facts.origin.get("data", {}).get("sources", ())
    return found


def _result(facts: CardFacts) -> Iterator[str]:
    lines = [line for line in facts.metrics if "eval/loss" in line and line["step"] <= facts.step]
    if not lines:
        return
    names = [name for name in RESULTS if f"eval/{name}" in lines[0]]
    yield from ("## Result", "")
    yield "Of the evaluation pairs:"
    yield ""
    yield from _table(("step", *(PAIR_METRICS[name].long for name in names)))
    for line in dict.fromkeys((0, len(lines) - 1)):
        yield _row(str(lines[line]["step"]), *(f"{lines[line][f'eval/{name}']:z.4f}" for name in names))
    if len(names) > 1:
        yield ""
        yield "The accuracy is the share of pairs whose chosen answer has the higher reward; the margin is the mean"
        yield "difference of the two rewards."


def _usage(facts: CardFacts) -> Iterator[str]:
    code = ", trust_remote_code=True" if facts.exported.has_own_code else ""
    here = "# this folder, or its id on the hub"
    yield from ("## Use", "", "```python")
    names = "AutoModelForCausalLM, AutoTokenizer" if facts.exported.has_tokenizer else "AutoModelForCausalLM"
    if facts.exported.adapters is None:
        yield f"from transformers import {names}"
        yield f'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto"{code})  {here}'
    else:
        yield from ("from peft import PeftModel", f"from transformers import {names}")
        yield f'base = AutoModelForCausalLM.from_pretrained("{facts.base.name}", dtype="auto"{code})'
        yield f'model = PeftModel.from_pretrained(base, ".")  {here}'
    if facts.exported.has_tokenizer:
        yield f'tokenizer = AutoTokenizer.from_pretrained("."{code})'
    yield "```"


def _versions(facts: CardFacts) -> Iterator[str]:
    known = [f"{name} {facts.origin[name]}" for name in PACKAGES if facts.origin.get(name)]
    commit = facts.origin.get("commit")
    changed = ", with changes" if facts.origin.get("dirty") else ""
    own = f"dpo {facts.origin.get('version') or ''}".strip() + (f" (commit {commit}{changed})" if commit else "")
    if known:
        yield from ("## Versions", "", ", ".join([own, *known]))


def _citation() -> Iterator[str]:
    yield from ("## Citation", "", "```bibtex", CITATION, "```")


# --- Markdown --------------------------------------------------------------------------------------------------------


def _named(base: Base) -> str:
    return _linked(base.name) if base.is_on_hub else f"`{base.name}`"


def _linked(hub_id: str, kind: str = "") -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})"


def _table(headings: Sequence[str]) -> Iterator[str]:
    yield _row(*headings)
    yield _row(*["---"] * len(headings))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
