"""General tools that know nothing of preferences: errors, files, arrays, processes; without torch.

errors.py       the exceptions with which a program of this package ends early
units.py        numbers with units, for people
limits.py       the limit of open file descriptors
full_disk.py    failures of writes for want of room
files.py        atomic writes of files and folders; the default cache folder
sums.py         the SHA-256 of the files of a folder, written and compared
space.py        whether files of a size fit in a folder, quotas included
arrays.py       .npy files that are read in parts, without memory mapping
arrow_files.py  files of rows in Arrow's format, mapped into memory
pages.py        HTML pages: their style sheet (page.css) and their template
prefetch.py     a thread builds the next item while the caller uses the current one
processes.py    facts of processes, as /proc shows them
workers.py      work in forked processes, which end with the process that started them
spawned.py      a function in a spawned process, which shares nothing with this one
"""
