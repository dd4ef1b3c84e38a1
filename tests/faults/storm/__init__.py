"""Random damages to all files that a start reads, and what the start makes of each: `python -m tests.faults.storm`.

damages.py    which files, and what happens to them
starts.py     the run that is damaged, and starts of it on two ranks
judging.py    what became of a start: recovered, refused, no effect, or a failure
"""
