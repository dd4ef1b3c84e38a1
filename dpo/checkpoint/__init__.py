"""Weights and optimizer on disk.

store.py        checkpoints: written, committed, verified, found, loaded
host_copies.py  a sharded state copied to host memory
saver.py        checkpoints are written by a thread while training goes on
export.py       a trained policy -> a model folder that transformers loads
"""
