"""The disk that a run needs, and whether its folders have it.

sizes.py        the bytes of checkpoints, exported model and evaluations
storage.py      checks that folders are shared, and that the run's files fit
home.py         tells that a cache lies in a small home folder
"""
