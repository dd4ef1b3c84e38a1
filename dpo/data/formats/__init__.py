"""A raw row -> `Example`: one reader per format, one table of formats.

text_lines.py  the lines of a text file with their numbers
json_rows.py   JSON and JSONL with line numbers
table_rows.py  CSV and TSV with line numbers
row_fields.py  the fields of raw rows, with their types checked
numbers.py     numbers of raw rows, which tables have as texts
example.py     `Example`, and the type of a reader
listed.py      readers: completions in a list, with pairs, scores or a ranking
pairwise.py    readers: a chosen and a rejected answer
published.py   readers: sets of texts as their authors published them
judged.py      readers: answers with a winner, votes, ranks or ratings
examples.py    `FORMATS`, and a row -> `Example`
"""
