"""`python -m dpo.inspect`: the data of a run as the trainer sees it, without a GPU and without weights.

All counts and examples are gathered in one value; from it come sentences and rows of tables, and from these the
terminal's text and the HTML page.

arguments.py    the command line; without torch
program.py      prints the inspection and writes the page
inspection.py   everything that is shown, in one value
statistics.py   the ends, repeats and lengths of a set of pairs
lengths.py      lengths in numbers: percentiles, histograms, length bias
step_tokens.py  the tokens of a step, and the tokens that shared prompts save
shown_pairs.py  pairs token by token
words.py        headings, sentences and rows of tables
findings.py     the unusual properties of the data, with advice
terminal.py     the inspection on a terminal
page.py         the inspection as one HTML page
"""
