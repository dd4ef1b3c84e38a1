"""What knows nothing of preferences: errors, command lines, files, the console. Without torch.

errors.py    the ways in which a program of this package ends early
command.py   command lines and exit codes of all programs
console.py   lines and bars for people, texts that must not steer a terminal
files.py     files and folders that are never seen half-written; the default cache
arrays.py    arrays in files, read where they are asked for
hub.py       what is an id of the Hugging Face hub, and not a path
status.py    how a program tells its launcher how it ended
prefetch.py  the next item is built by a thread while this one is used
workers.py   work in forked processes, which end with the process that started them
"""
