"""The files of a run folder that are read without torch, also by launch and the report.

files.py        the names of the files of a run folder, and its metrics
evaluations.py  the values of single pairs at each evaluation
fallen.py       the warning that winners have fallen far below the reference
forecast.py     what a run needs of a cluster
advice.py       what is told after a stop
"""
