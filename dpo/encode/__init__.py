"""`Example` -> token ids, before any limit.

tokenizer.py    finds and loads a tokenizer
stops.py        the stop tokens of a model: of its tokenizer, config.json and generation_config.json
controls.py     control tokens in texts: those that a template writes, apart from text that only spells them
coder.py        texts -> ids at the beginning and in the middle of a text; the boundary of prompt and completion
encoder.py      a tokenizer with its BOS, stop tokens and control tokens; its content
text.py         texts -> ids
chat.py         messages -> ids, by the chat template
unwritten.py    whether a chat template writes what the messages say
encoding.py     `Example` -> ids
"""
