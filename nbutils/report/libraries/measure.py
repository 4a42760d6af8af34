"""What one library does to the weight of every image, measured by watching a short training.

An epoch has micro-batches of 4, and 3 of them make a window. Which micro-batches went into an
update, and how much each image weighed in it, is read off the gradient
(`nbutils.accumulation.check.probe` says how).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.check.probe import Batches, Probe, make_probe
from nbutils.accumulation.check.watch import Run, Update, watch
from nbutils.report.libraries import hugging_face, others
from nbutils.report.libraries.task import (
    BATCH_SIZE,
    EPOCHS,
    IGNORED,
    STEPS,
    WINDOW,
    Task,
    this_project,
)

NOT_ITS_JOB, NOT_OFFERED = "not its job", "not offered"
TOLERANCE = 1e-4
CLIP = 1.0


@dataclass(frozen=True)
class Library:
    """How to run a library.

    Attributes:
        loop: Trains with it.
        package: Its name on PyPI; "" for this project.
        answers: Probes that cannot be run with it, and why.
        words: Verdicts of this library where a probe is not right.
    """

    loop: Callable[[Task], None]
    package: str
    answers: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


_TOKENS = {"unequal tokens": NOT_ITS_JOB}
_NO_LOG = {"logged loss": NOT_ITS_JOB}
LIBRARIES = {
    "this project": Library(this_project, ""),
    "accelerate": Library(hugging_face.accelerate, "accelerate", _TOKENS | _NO_LOG),
    "accelerate, loader not prepared": Library(
        hugging_face.accelerate_unprepared, "accelerate", _TOKENS | _NO_LOG
    ),
    "transformers, plain model": Library(hugging_face.transformers_plain, "transformers"),
    "transformers, model with **kwargs": Library(hugging_face.transformers_kwargs, "transformers"),
    "transformers, ResNetForImageClassification": Library(
        hugging_face.transformers_resnet, "transformers"
    ),
    "transformers, model with num_items_in_batch": Library(
        hugging_face.transformers_num_items, "transformers"
    ),
    "lightning": Library(others.lightning, "lightning", _TOKENS),
    "keras": Library(others.keras, "keras"),
    "pytorch-ignite": Library(
        others.ignite,
        "pytorch-ignite",
        _TOKENS | {"clipping": NOT_OFFERED, "schedule": NOT_ITS_JOB},
    ),
    "fastai": Library(
        others.fastai,
        "fastai",
        _TOKENS,
        {"schedule": "by fraction of training", "logged loss": "smoothed"},
    ),
    "poutyne": Library(others.poutyne, "poutyne", _TOKENS),
    "torchtnt": Library(others.torchtnt, "torchtnt", _TOKENS),
    "pytorch-accelerated": Library(others.pytorch_accelerated, "pytorch-accelerated", _TOKENS),
    "composer": Library(others.composer, "mosaicml"),
}


def _problem(name: str) -> Probe:
    """What is trained; "tokens" ignores some labels, as those of padding are ignored."""
    probe = make_probe({"clipping": "large", "tokens": "full"}.get(name, name))
    images, labels = probe.batches.dataset.tensors
    if name == "tokens":
        labels = labels.clone()
        labels[1 - BATCH_SIZE :] = IGNORED
    if name == "clipping":
        # Micro-batches share images, or clipping the values of each would change nothing.
        images = images[torch.arange(len(images)) % BATCH_SIZE]
        labels = torch.arange(len(images)) // 5 % 3
    probe.batches = Batches(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    return probe


def observe(name: str) -> list[dict[str, object]]:
    """Run every probe with a library, in this process.

    Returns:
        One row per probe: `probe`, `measured` (None where it was not run), `verdict`.
    """
    library = LIBRARIES[name]
    runs = {}
    for problem in ("full", "short", "unequal", "tokens", "clipping"):
        if not {problem, f"unequal {problem}"} & set(library.answers):
            with watch(_problem(problem)) as runs[problem]:
                library.loop(Task(runs[problem], CLIP if problem == "clipping" else None))
    rows: list[dict[str, object]] = []
    for probe, judge in PROBES.items():
        measured: float | None = None
        if probe in library.answers:
            verdict = library.answers[probe]
        else:
            value, verdict = judge(runs)
            measured = float(f"{value:.5g}")
            verdict = verdict if verdict == "right" else library.words.get(probe, verdict)
        rows.append({"probe": probe, "measured": measured, "verdict": verdict})
    return rows


Measured = tuple[float, str]


def _weights(run: Run, update: Update) -> Tensor:
    """The weight of each image in an update, shape (images,)."""
    labels = run.probe.batches.dataset.tensors[1]
    alone = run.start.T[: len(labels)].mul(run.probe.model.scale).softmax(1)
    alone -= F.one_hot(labels.clamp(min=0), alone.shape[1])
    seen = update.gradient.T[: len(labels)] / run.probe.model.scale
    return (seen * alone).sum(1) / (alone * alone).sum(1)


def _second_window(run: Run) -> tuple[Update | None, Tensor, str]:
    """The update of the first epoch's second window, its weights, and whether it has more in it."""
    labels = run.probe.batches.dataset.tensors[1]
    for update in run.updates:
        if any(one.epoch == 0 and WINDOW in one.images for one in update.backwards):
            weights = _weights(run, update)[: len(labels)]
            return update, weights[WINDOW:], "carried over" if update.carried else ""
    return None, torch.zeros(1), "dropped"


def _full_window(runs: Mapping[str, Run]) -> Measured:
    """Sum of the images' weights in a full window; 1 is right."""
    run = runs["full"]
    size = _weights(run, run.updates[0]).sum().item()
    return size, "right" if _near(size, 1) else "not divided" if _near(size, STEPS) else "other"


def _short_window(runs: Mapping[str, Run]) -> Measured:
    """Sum of the images' weights of a last window of two micro-batches; 1 is right."""
    _, weights, elsewhere = _second_window(runs["short"])
    size = weights.sum().item()
    words = {1.0: "right", 2 / 3: "divided by a full window", 2.0: "not divided"}
    return size, elsewhere or next((w for value, w in words.items() if _near(size, value)), "other")


def _unequal(runs: Mapping[str, Run], probe: str = "unequal") -> Measured:
    """The weight of the only image in a micro-batch, relative to one in a micro-batch of 4."""
    _, weights, elsewhere = _second_window(runs[probe])
    share = (weights[2 * BATCH_SIZE] / weights[0]).item()
    return share, elsewhere or ("right" if _near(share, 1) else "mean of means")


def _tokens(runs: Mapping[str, Run]) -> Measured:
    """The same for tokens: the weight of the only one in a micro-batch that is not ignored."""
    return _unequal(runs, "tokens")


def _clipping(runs: Mapping[str, Run]) -> Measured:
    """Relative difference from the true gradient of a window, clipped once; 0 is right."""
    run = runs["clipping"]
    model, update = run.probe.model, run.updates[0]
    images, labels = (torch.cat(parts) for parts in zip(*run.probe.batches[:STEPS], strict=True))
    truth = torch.autograd.grad(F.cross_entropy(model(images), labels), model.weight)[0]
    clipped = truth * CLIP / truth.norm(), truth.clamp(-CLIP, CLIP)
    error = min(((update.gradient - one).norm() / one.norm()).item() for one in clipped)
    if error < TOLERANCE:
        return 0.0, "right"
    between = any(
        earlier.after is not None and not torch.equal(earlier.after, later.before)
        for earlier, later in pairwise(update.backwards)
    )
    return error, "each micro-batch" if between else "other"


def _schedule(runs: Mapping[str, Run]) -> Measured:
    """Steps of the schedule per update; 1 is right."""
    steps = len(runs["full"].schedule) / len(runs["full"].updates)
    return steps, "right" if steps == 1 else "each micro-batch" if steps > 1 else "each epoch"


def _updates(runs: Mapping[str, Run]) -> Measured:
    """Updates per epoch of five micro-batches; 2 is right."""
    updates = len(runs["short"].updates) / EPOCHS
    return updates, "right" if updates == 2 else "too few"


def _logged_loss(runs: Mapping[str, Run]) -> Measured:
    """The loss reported for an epoch, relative to the mean over its images; 1 is right."""
    for name in ("full", "unequal"):
        images, labels = runs[name].probe.batches.dataset.tensors
        losses = F.cross_entropy(runs[name].probe.model(images), labels, reduction="none")
        truth, logged = losses.mean().item(), torch.as_tensor(runs[name].returned[0]).mean().item()
        words = {truth: "right", truth / STEPS: "divided by the steps"}
        words |= {truth * STEPS: "multiplied by the steps"}
        if name == "unequal":
            words[_mean_of_means(losses, BATCH_SIZE)] = "mean of micro-batches"
            words[_mean_of_means(losses, WINDOW)] = "mean of updates"
        verdict = next((word for value, word in words.items() if _near(logged, value)), "other")
        if verdict != "right":
            break
    return logged / truth, verdict


def _mean_of_means(losses: Tensor, size: int) -> float:
    return torch.stack([part.mean() for part in losses.split(size)]).mean().item()


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= TOLERANCE * abs(other)


PROBES: dict[str, Callable[[Mapping[str, Run]], Measured]] = {
    "full window": _full_window,
    "short last window": _short_window,
    "unequal micro-batches": _unequal,
    "unequal tokens": _tokens,
    "clipping": _clipping,
    "schedule": _schedule,
    "updates per epoch": _updates,
    "logged loss": _logged_loss,
}
"""What is measured; each function's first line says in which unit."""


def main(package: str, out: str) -> None:
    """Observe what needs a package; write the rows as JSON to the file `out`."""
    rows = [
        {"library": name, **row}
        for name, library in LIBRARIES.items()
        if library.package == package
        for row in observe(name)
    ]
    number = torch.__version__.partition("+")[0]
    Path(out).write_text(json.dumps({"torch": number, "rows": rows}))
