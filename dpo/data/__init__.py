"""A row of a file -> `Example` -> token ids -> numbered pairs.

formats/        a raw row -> `Example`, one reader per format
caching.py      the cache of rows, by content; calls of `datasets` that fail in one line
hub_sets.py     data sets of the hub: downloaded, then read without the network
sources.py      a source of the config -> its raw rows
stops.py        the stop tokens of a model: of its tokenizer, config.json and generation_config.json
controls.py     control tokens in texts: those that a template writes, apart from text that only spells them
coder.py        texts -> ids at the beginning and in the middle of a text; the boundary of prompt and completion
encoder.py      a tokenizer with its BOS, stop tokens and control tokens; its content
text.py         texts -> ids
chat.py         messages -> ids, by the chat template
unwritten.py    whether a chat template writes what the messages say
encoding.py     `Example` -> ids, before any limit
tokenizer.py    finds and loads a tokenizer
tokens.py       `Example` -> `TokenizedExample`: limits, truncation, drops; keys of token ids
token_rows.py   the tokenized rows of a source, cached on disk
pair_values.py  weight and margin of the pairs of a row
workers.py      the processes that tokenize, and how the run ends where the kernel kills one of them
holdout.py      which prompts are held out of training
shares.py       how many pairs of a source an epoch has, and which
pair_set.py     the pairs of an epoch, as files of places in token rows
numbering.py    token rows -> the files of a pair set
report.py       counts of rows and pairs that were read, dropped and truncated
prepare.py      all sources -> training and evaluation pairs
"""
