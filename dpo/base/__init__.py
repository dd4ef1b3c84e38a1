"""Tools that do not depend on preference data or on torch: errors, command lines, files, the console.

errors.py       the exceptions with which a program of this package ends early
command.py      command lines of all programs
exits.py        how a program begins and ends: exit codes, the line of an error
likeness.py     the name that a mistyped word was probably meant to be
console.py      log lines and progress bars; text made safe for a terminal
terminal.py     draws lines and a bar on a terminal with rich; plain lines elsewhere
log_file.py     the log of a run, a file
units.py        numbers with units, for people
limits.py       the limit of open file descriptors
files.py        atomic writes of files and folders; the default cache folder
space.py        whether files of a size fit in a folder, quotas included
arrays.py       .npy files that are read in parts, without memory mapping
pages.py        HTML pages: their style sheet (page.css) and their template
hub.py          tells ids of the Hugging Face hub from local paths
hub_files.py    which files of a model's repository a program reads, and which a folder lacks
hub_reasons.py  why the hub failed, in a few words
snapshots.py    repositories of the hub -> local folders, from which a run reads without the network
rank.py         what torchrun's environment says of this process
status.py       reports to the launcher how far a program is, and how it ended
blame.py        the failure to blame among the failures of all ranks
prefetch.py     a thread builds the next item while the caller uses the current one
workers.py      work in forked processes, which end with the process that started them
spawned.py      a function in a spawned process, which shares nothing with this one
"""
