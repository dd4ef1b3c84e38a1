"""A run in TensorBoard: where a metric is shown (`charts`), the files (`event_files`), the HParams entry (`hparams`),
and all of it together, written by rank 0 (`dashboard`). None of it imports torch.
"""
