"""The reference's log-probabilities: computed once, kept by content, never stale.

blocks.py  the files of the cache: blocks of rows by key
table.py   the rows of a run's data, sorted, in one file of the cache
making.py  what a row depends on: the facts of its key, and how it was made
cache.py   which part of the cache is the reference of a run
fill.py    rows that the cache lacks are computed
"""
