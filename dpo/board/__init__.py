"""All that shows a run while it goes on: metrics.jsonl, and sinks such as TensorBoard. Without torch.

sink.py         the interface of a sink
sinks.py        opens the sinks that `train.report_to` names
charts.py       the tags of metrics, histograms and texts; the page of charts
bins.py         the buckets of a histogram
event_files.py  TensorBoard's event files: opens, appends, removes points
hparams.py      the run's entry in the HParams tab
dashboard.py    TensorBoard's charts, histograms, texts and answers of a run
writer.py       writes metrics.jsonl, and hands all that is shown to the sinks
"""
