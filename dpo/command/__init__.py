"""How a program begins and ends: its command line, exit code and last line; without torch.

line.py         command lines of all programs
likeness.py     the name that a mistyped word was probably meant to be
exits.py        exit codes, and the line of an error
rank.py         what torchrun's environment says of this process
status.py       reports to the launcher how far a program is, and how it ended
blame.py        the failure to blame among the failures of all ranks
"""
