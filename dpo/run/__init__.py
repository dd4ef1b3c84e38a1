"""A run, apart from its steps: its inputs, its folder, its identity, its answers and its model card.

schedule.py       after which steps a run evaluates and saves
folder.py         decides from a run folder how a run starts, and prepares the folder
provenance.py     versions, git commit and data of a start
agreement.py      checks that models and tokenizer agree on the ids of the data
model_files.py    hashes the files beside the weights of a run's models
inputs.py         finds, checks and hashes all input
own_code.py       refuses code of a model's repository that only the config of a run folder asks for
identity.py       the facts that must be the same at every start of a run
layout.py         the devices and settings by which the steps of a start are computed
answers.py        answers of policy and reference to a few evaluation prompts
card_facts.py     reads the facts of a model card
card_adapters.py  what a model card tells of adapters
card.py           writes the model card of an exported model
"""
