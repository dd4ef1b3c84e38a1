"""One update: log-probabilities -> losses -> gradient -> weights; and the same without gradient.

losses.py      the losses on the paper's index signature
objective.py   log-probabilities of a batch -> what is minimized, and rewards
optim.py       optimizers, lr_at(step), the norm of a sharded gradient
metrics.py     sums on the device -> one exchange per step -> metrics
update.py      train_step
evaluation.py  a pass without gradients over the evaluation set
deviation.py   how far a policy is from its reference at first, and how far it may be
first_step.py  the check of a fresh run's first step: the policy is its own reference
"""
