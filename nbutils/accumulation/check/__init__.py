"""The checker: which rule of accumulation a training loop breaks, found by running and watching it.

`probe` holds the tiny problems, `watch` records what a loop does to them. Three files compare the
record with the rules: `bookkeeping` (which backward passes an update used), `image_weights` (how
much each image weighed) and `logged_loss`. `batch_norm` looks at a reader's own model. `findings`
lists the rules; `judge` puts it all together.
"""

from nbutils.accumulation.check.findings import RULES, Finding, Report
from nbutils.accumulation.check.judge import check_accumulation, judge
from nbutils.accumulation.check.probe import PROBES, Probe, make_probe
from nbutils.accumulation.check.watch import Run, run_loop, watch

__all__ = [
    "PROBES",
    "RULES",
    "Finding",
    "Probe",
    "Report",
    "Run",
    "check_accumulation",
    "judge",
    "make_probe",
    "run_loop",
    "watch",
]
