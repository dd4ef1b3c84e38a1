"""What launch and the report know of a run: the files of its folder, and words; without torch.

files.py        the names of the files of a run folder, and its metrics
evaluations.py  the values of single pairs at each evaluation
fallen.py       the warning that winners have fallen far below the reference
holder.py       who holds a run folder, and whether it is over
lock.py         one start at a time writes to a run folder
forecast.py     what a run needs of a cluster
advice.py       what is told after a stop
"""
