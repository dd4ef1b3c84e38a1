"""One update: log-probabilities -> losses -> gradient -> weights; and evaluation, which stops at the losses.

losses.py      the losses on the paper's index signature
objective.py   log-probabilities of a batch -> losses of its pairs, and rewards
optim.py       optimizers, lr_at(step), the norm of a sharded gradient
metrics.py     sums on the device -> one exchange per step -> metrics
update.py      train_step
nonfinite.py   finds the pairs of a step that is not finite
evaluation.py  a pass without gradients over the evaluation set
deviation.py   the difference between a policy and its reference before training, and its bound
first_step.py  the check of a fresh run's first step, whose policy is its own reference
"""
