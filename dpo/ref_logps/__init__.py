"""The reference's log-probabilities: computed once, cached by content, never stale.

blocks.py         the files of the cache: immutable blocks of rows, each a key and a log-probability
table.py          the rows of a run's data, sorted by key in one file of the cache
circumstances.py  the numerics in a row's key, and the circumstances of its computation that are not
cache.py          the folder of the cache that belongs to a run's reference
fill.py           computes the rows that the cache lacks
"""
