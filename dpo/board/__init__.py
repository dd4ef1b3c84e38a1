"""All that shows a run while it goes on: metrics.jsonl, and sinks such as TensorBoard. Without torch.

sink.py         the interface of a sink
sinks.py        opens the sinks that `train.report_to` names
words.py        words for metrics
charts.py       the tags of metrics, histograms and texts; the page of charts
bins.py         the buckets of a histogram
values.py       a config as plain values by name
event_files.py  TensorBoard's event files: opens, appends, removes points
hparams.py      the run's entry in the HParams tab
dashboard.py    TensorBoard's charts, histograms, texts and answers of a run
tracker.py      the sink of an experiment tracker: each row is sent once, over all starts of a run
journal.py      the record of what a tracker was sent
to_wandb.py     a run in W&B; imported only where train.report_to names it
wandb_file.py   reads the files to which W&B writes a run
to_trackio.py   a run in trackio; imported only where train.report_to names it
writer.py       writes metrics.jsonl, and hands all that is shown to the sinks
"""
