"""A raw row -> `Example`: one `Reading` per source, one reader per format, one table of formats.

text_lines.py  the lines of a text file with their numbers
json_rows.py   JSON and JSONL with line numbers
table_rows.py  CSV and TSV with line numbers
row_fields.py  the fields of rows and messages, with their types checked
numbers.py     numbers of raw rows, which tables have as texts
json_text.py   lists, objects and messages that are kept as text
example.py     `Example`, and the type of a reader
listed.py      readers: completions in a list, with pairs, scores or a ranking
pairwise.py    readers: a chosen and a rejected answer
published.py   readers: sets of texts as their authors published them
demonstrations.py  reader: an answer that is compared with nothing
judged.py      readers: answers with a winner, votes, ranks or ratings
examples.py    `FORMATS`, and a row by known names -> `Example`
columns.py     the source's own names of columns, and the columns that look like part of the prompt
chat.py        texts -> messages; system messages, arguments of the chat template
reading.py     `Reading`, the way in which a source is read; a raw row -> `Example`
decision.py    the columns and the first row of a source -> its `Reading`
"""
