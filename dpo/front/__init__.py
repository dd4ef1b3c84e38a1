"""The command `dpo NAME`: a table of programs, read before torch is imported, and the ranks that `dpo` starts itself.

`dpo train my.yaml --gpus 8`:

    main.py     checks the command line
    parent.py     serves the store, takes the signals, prints the last line
    rank.py x 8     each runs dpo.train, in a session of its own

names.py       the names, their modules, one line about each
main.py        python -m dpo
ranks.py       how many ranks a command line asks for
parent.py      starts the ranks with torchrun's API, and waits for them; imports torch
stops.py       signals that ask a run to save, in the parent and in the ranks
ending.py      the exit code and the last line of a command that started ranks
rank.py        python -m dpo.front.rank: a program as one rank, which ends with its parent
configs.py     dpo configs: lists and copies the shipped configs
completion.py  dpo completion: completes names, flags and files in a shell
api.py         load_config and run_training for Python; imports torch where a run begins
"""
