"""A run in TensorBoard, and its metrics.jsonl. Without torch.

charts.py       where a metric is shown
event_files.py  TensorBoard's files
hparams.py      the entry in the HParams tab
dashboard.py    a run's charts, histograms, texts and answers
writer.py       metrics.jsonl and the dashboard, step by step
"""
