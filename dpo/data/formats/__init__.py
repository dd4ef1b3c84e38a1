"""A raw row -> `Example`: one reader a format, one table of formats.

json_rows.py   JSON and JSONL with line numbers
row_fields.py  fields of raw rows, typed
examples.py    the formats, and a row -> `Example`
"""
