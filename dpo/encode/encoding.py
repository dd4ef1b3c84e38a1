"""An `Example` -> ids before any limit: texts, messages and rows of ids, each by its own rule."""

from dpo.encode.chat import encode_chat
from dpo.encode.encoder import Completion, Encoded, Encoder
from dpo.encode.text import encode_texts
from dpo.sources.formats.example import Example


def encode(example: Example, encoder: Encoder) -> Encoded:
    """Returns the ids of the prompt and of each completion, a stop token at the end of texts and chats, before any
    limit.

    Raises InvalidValue where the tokenizer has no chat template for messages, or the template does not serve.
    """
    prompt, completions = example.prompt, example.completions
    if encoder.tokenizer is None:
        return Encoded(list(prompt), tuple(Completion(list(ids)) for ids in completions))  # type: ignore[arg-type]  # ids
    if isinstance(prompt, str):
        return encode_texts(encoder, prompt, completions)  # type: ignore[arg-type]  # texts
    return encode_chat(encoder, prompt, completions, example.template_args)  # type: ignore[arg-type]  # chat
