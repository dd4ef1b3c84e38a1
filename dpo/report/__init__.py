"""`python -m dpo.report RUN...`: a run, or several side by side, as one HTML page; without torch.

A page has no script and loads nothing. A training run writes its own at the end, `RUN/report.html`.

arguments.py  the command line
program.py    writes the page
record.py     the files of a run folder, as far as they can be read
numbers.py    bins, correlation, calibration and other numbers of single pairs
metrics.py    curves, hours and other numbers of metrics.jsonl
story.py      sentences about a run's numbers
scales.py     ticks and numbers as text
drawing.py    lines, points and bars in SVG
one_run.py    numbers and charts of one run
listings.py   answers, config and code of one run
sweep.py      several runs: differing keys, a table, curves, colors
heat_maps.py  a sweep over one or two keys
page.py       the parts as HTML
"""
