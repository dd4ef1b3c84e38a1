"""Repositories of the Hugging Face hub, and the files of a model's folder; without torch.

ids.py          tells ids of the hub from local paths
files.py        which files of a model's repository a program reads, and which a folder lacks
reasons.py      why the hub failed, in a few words
snapshots.py    repositories of the hub -> local folders, from which a run reads without the network
"""
