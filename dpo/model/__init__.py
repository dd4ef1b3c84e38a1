"""`PackedBatch` -> log-probabilities: how a sharded policy is built, loaded and run.

matching.py      matches the tensors of a model with those in the files of its folder
weights.py       hashes, reads and writes the tensors of model folders; each rank reads and writes its shards
nf4_reading.py   reads weights that are stored as NF4, a tensor at a time
model_config.py  reads and checks the config of a model folder
source.py        a model by its content: folder, config, adapters, hash
download.py      finds model folders, local or of the hub
flex_options.py  FlexAttention's kernel options by architecture and head size
attention.py     shared-prefix attention: segments on a CPU, FlexAttention on CUDA
kernels.py       compiles layers, counts their graphs, keeps their kernels between starts
parallelize.py   composes activation checkpointing, compilation and sharding onto a model
log_probs.py     hidden states -> log-probabilities, a chunk of rows at a time
policy.py        Policy, and its forward pass on packed trees
build.py         a model folder -> a sharded policy
on_meta.py       the model of a run on the meta device, with its adapters
warm_up.py       compiles all graphs of a run before its first step
generation.py    generates answers with a sharded policy
"""
