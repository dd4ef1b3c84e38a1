"""What a model card tells of adapters: of a folder of adapters by its adapter_config.json, of a whole model to whose
weights they were added by the run's config.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo.config import LoraConfig
from dpo.run.card_facts import CardFacts, short_name


def adapter_words(facts: CardFacts) -> str:
    """Returns rank, alpha and targets of the adapters that were trained; empty where the whole model was."""
    if facts.exported.adapters is not None:
        return words_of(facts.exported.adapters)
    lora = facts.config.lora
    if lora.path is not None:
        return f"those of `{short_name(lora.path)}`, trained further"
    return "" if lora.rank is None else words_of(_as_peft(lora, lora.rank))


def words_of(settings: Mapping[str, Any]) -> str:
    """Returns rank, alpha and targets by the keys of adapter_config.json."""
    targets = [*_names(settings.get("target_modules")), *_names(settings.get("target_parameters"))]
    kinds = {"use_rslora": "rsLoRA", "use_dora": "DoRA"}
    whole = _names(settings.get("modules_to_save"))
    words = [
        f"rank {settings['r']}",
        f"alpha {settings['lora_alpha']:g}",
        *(word for key, word in kinds.items() if settings.get(key)),
        f"on {', '.join(targets)}",
        *([f"trained whole: {', '.join(whole)}"] if whole else []),
    ]
    return ", ".join(words)


def _as_peft(lora: LoraConfig, rank: int) -> dict[str, Any]:
    """Returns the keys of adapter_config.json that the config gives, with the names that it gives."""
    return {
        "r": rank,
        "lora_alpha": 2 * rank if lora.alpha is None else lora.alpha,
        "target_modules": lora.target_modules or "all-linear",
        "target_parameters": lora.target_parameters,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": ["embeddings", "head"] if lora.train_embeddings else None,
    }


def _names(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else sorted(names or [])
