"""`PackedBatch` -> log-probabilities: a sharded policy, built, loaded and run.

weights.py       model folders: found, hashed, read and written, a shard a rank
flex_options.py  FlexAttention's kernel options by architecture and head size
attention.py     shared-prefix attention: segments on a CPU, FlexAttention on CUDA
kernels.py       compiled layers counted, their kernels kept between starts
parallelize.py   checkpointing, compilation and sharding, composed onto a model
log_probs.py     hidden states -> log-probabilities, the vocabulary in chunks
policy.py        Policy, and its forward pass on packed trees
build.py         a model folder -> a sharded policy
warm_up.py       what steps run is compiled before the first of them
generation.py    answers from a sharded policy
"""
