"""A run in TensorBoard, and its metrics.jsonl. Without torch.

charts.py       the chart of each metric
event_files.py  TensorBoard's event files: opens, appends, removes points
hparams.py      the run's entry in the HParams tab
dashboard.py    a run's charts, histograms, texts and answers
writer.py       writes metrics to metrics.jsonl and the dashboard
"""
