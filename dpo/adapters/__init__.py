"""LoRA: which adapters a model gets, in which layers, how they start and what they are called. By peft's modules.

spec.py        AdapterSpec: all that decides which adapters a model gets
reading.py     reads a folder of adapters in peft's form: adapter_config.json
kinds.py       the kinds of adapters that are refused, by the keys of adapter_config.json
base.py        the base of adapters that are named as a model is
choice.py      the adapters that a config asks for
targets.py     the layers of a model that get adapters
inject.py      puts adapters into a model on the meta device, and freezes its other weights
names.py       the names of a model's tensors without adapters, and of adapters in their file
switch.py      runs a model without its adapters
start.py       the values with which adapters start
quantized.py   the frozen weights of a model that are stored as NF4
nf4_linear.py  a linear layer whose weight is stored as NF4
nf4.py         weights as the bytes of NF4, and back
merge.py       adds adapters to the weights that they adapt
"""
