"""The adapters that a config asks for: by the keys of `lora`, or by the folder that `lora.path` names."""

from dataclasses import replace
from pathlib import Path

from dpo.adapters.reading import read_spec
from dpo.adapters.spec import ALL_LINEAR, AdapterSpec
from dpo.config import Config, LoraConfig


def find_adapters(config: Config) -> AdapterSpec | None:
    """Returns the adapters of a run; None where its whole model is trained.

    Raises:
        UserError: the folder of `lora.path` cannot be used, or another key of `lora` contradicts it.
    """
    lora = config.lora
    if lora.path is not None:
        return replace(read_spec(Path(lora.path)), folder=Path(lora.path))
    return None if lora.rank is None else _by_keys(lora, lora.rank)


def _by_keys(lora: LoraConfig, rank: int) -> AdapterSpec:
    """Returns the adapters that the keys of `lora` describe."""
    return AdapterSpec(
        rank=rank,
        alpha=2.0 * rank if lora.alpha is None else lora.alpha,
        target_modules=_words(lora.target_modules or ALL_LINEAR),
        target_parameters=tuple(lora.target_parameters or ()),
        exclude_modules=_words(lora.exclude_modules or ()),
        rslora=bool(lora.rslora),
        dora=bool(lora.dora),
        embeddings=bool(lora.train_embeddings),
    )


def _words(words: str | list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    return words if isinstance(words, str) else tuple(words)
