"""A raw row -> `Example`: one reader per format, one table of formats.

json_rows.py   JSON and JSONL with line numbers
row_fields.py  fields of raw rows, typed
example.py     `Example`, and what a reader is
listed.py      readers: completions in a list, with pairs, scores or a ranking
pairwise.py    readers: a chosen and a rejected answer
published.py   readers: sets of texts as their authors published them
examples.py    `FORMATS`, and a row -> `Example`
"""
