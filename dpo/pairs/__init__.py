"""`Example` -> the numbered pairs of an epoch: limits of tokens, caches, hold-out, shares.

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
