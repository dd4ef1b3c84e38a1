"""Weights and optimizer state on disk.

marker.py        the size and hash of every file of a checkpoint, and files that differ
metadata.py      reads the list of a checkpoint's tensors, a pickle, without calling what it names
verify.py        compares a checkpoint with its hashes, by all ranks together
folders.py       lists the checkpoints of a run, and removes those that are not kept
state.py         reads the state of a run apart from its tensors
plans.py         caches torch's plans from one checkpoint to the next
fingerprint.py   hashes sharded weights, whatever the layout
store.py         writes, commits and loads checkpoints
host_copies.py   copies a sharded state to host memory
saver.py         writes checkpoints in a thread while training continues
export_dtype.py  decides the dtype of an exported model
companions.py    writes the files of an exported model beside its weights
export_adapters.py  writes trained adapters in peft's form
final_sums.py    the hashes of an exported model's files
export.py        writes a trained policy as a model folder that transformers loads
"""
