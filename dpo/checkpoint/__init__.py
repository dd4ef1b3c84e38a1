"""Weights and optimizer state on disk.

store.py         writes, commits, verifies, finds and loads checkpoints
host_copies.py   copies a sharded state to host memory
saver.py         writes checkpoints in a thread while training continues
export_dtype.py  decides the dtype of an exported model
companions.py    writes the files of an exported model beside its weights
export.py        writes a trained policy as a model folder that transformers loads
"""
