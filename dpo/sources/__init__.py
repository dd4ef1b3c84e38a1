"""A source of the config -> rows of its files -> `Example`.

formats/        a raw row -> `Example`, one reader per format
caching.py      the cache of rows, by content; calls of `datasets` that fail in one line
kept.py         folders of the cache with the SHA-256 of their files, made again where one is damaged
hub_sets.py     data sets of the hub: downloaded, then read without the network
hub_sums.py     the SHA-256 of the files of a hub's data set, beside which other programs have files
saved.py        folders that `save_to_disk` wrote
filled.py       the columns that hold a value in some row
source.py       a source of the config -> its raw rows
"""
