"""What one library does to the weight of every image, measured by watching a short training.

Micro-batches have 4 images, and 3 make a window. Which went into an update, and how much each image
weighed in it, is read off the gradient (`nbutils.accumulation.check.probe` says how).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.accumulation.check.probe import Batches, Probe, make_probe
from nbutils.accumulation.check.watch import Run, Update, watch
from nbutils.accumulation.vectors import relative_difference
from nbutils.report.libraries import hugging_face, others
from nbutils.report.libraries.hugging_face import accelerate, transformers
from nbutils.report.libraries.task import Task, this_project

BATCH_SIZE, STEPS, WINDOW = Task.batch_size, Task.steps, Task.window
TOLERANCE, CLIP = 1e-4, 1.0
Runs = Mapping[str, Run]
"""The runs of one library, by what was trained."""


class Library(NamedTuple):
    """How to run a library, and the verdicts that a probe of it has instead of those measured."""

    loop: Callable[[Task], None]
    answers: Mapping[str, str] = {}  # to probes that cannot be run with it
    words: Mapping[str, str] = {}  # where the verdict is not "right"


NO_TOKENS = {"unequal tokens": "not its job"}
NO_LOG = NO_TOKENS | {"logged loss": "not its job"}
IGNITE = NO_TOKENS | {"clipping": "not offered", "schedule": "not its job"}
FASTAI = {"schedule": "by fraction of training", "logged loss": "smoothed"}
LIBRARIES = {
    "this project": Library(this_project),
    "accelerate": Library(accelerate, NO_LOG),
    "accelerate, loader not prepared": Library(partial(accelerate, prepare_loader=False), NO_LOG),
    **{
        f"transformers, {name}": Library(partial(transformers, make=make))
        for name, make in hugging_face.MODELS.items()
    },
    "lightning": Library(others.lightning, NO_TOKENS),
    "keras": Library(others.keras),
    "pytorch-ignite": Library(others.ignite, IGNITE),
    "fastai": Library(others.fastai, NO_TOKENS, FASTAI),
    "poutyne": Library(others.poutyne, NO_TOKENS),
    "torchtnt": Library(others.torchtnt, NO_TOKENS),
    "pytorch-accelerated": Library(others.pytorch_accelerated, NO_TOKENS),
    "composer": Library(others.composer),
}
"""By their names in the table, in its order: a package, or "package, variant"."""


def package_of(name: str) -> str:
    """The package on PyPI of a library; "" for this project."""
    package = name.partition(",")[0]
    return {"this project": "", "composer": "mosaicml"}.get(package, package)


def _problem(name: str) -> Probe:
    """What is trained; "tokens" ignores some labels, as those of padding are ignored."""
    probe = make_probe({"clipping": "large", "tokens": "full"}.get(name, name))
    images, labels = probe.batches.dataset.tensors
    if name == "tokens":
        labels = labels.clone()
        labels[1 - BATCH_SIZE :] = Task.ignored
    if name == "clipping":
        # Micro-batches share images, or clipping the values of each would change nothing.
        images = images[torch.arange(len(images)) % BATCH_SIZE]
        labels = torch.arange(len(images)) // 5 % 3
    probe.batches = Batches(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    return probe


def observe(name: str) -> list[dict[str, object]]:
    """Run every probe with a library, in this process.

    One row per probe: `library`, `probe`, `measured` (None if it was not run), `verdict`.
    """
    loop, answers, words = LIBRARIES[name]
    runs = {}
    for problem in ("full", "short", "unequal", "tokens", "clipping"):
        if not {problem, f"unequal {problem}"} & set(answers):
            with watch(_problem(problem)) as runs[problem]:
                loop(Task(runs[problem], CLIP if problem == "clipping" else None))
    rows: list[dict[str, object]] = []
    for probe, judge in PROBES.items():
        measured, verdict = None, answers.get(probe, "")
        if not verdict:
            value, verdict = judge(runs)
            measured = float(f"{value:.5g}")
            verdict = verdict if verdict == "right" else words.get(probe, verdict)
        rows.append({"library": name, "probe": probe, "measured": measured, "verdict": verdict})
    return rows


def _weights(run: Run, update: Update) -> Tensor:
    """The weight of each image in an update, shape (images,)."""
    labels = run.probe.batches.dataset.tensors[1]
    alone = run.start.T[: len(labels)].mul(run.probe.model.scale).softmax(1)
    alone -= F.one_hot(labels.clamp(min=0), alone.shape[1])
    seen = update.gradient.T[: len(labels)] / run.probe.model.scale
    return (seen * alone).sum(1) / (alone * alone).sum(1)


def _second_window(run: Run) -> tuple[Tensor, str]:
    """The images' weights in the first epoch's second window, and where else its gradient went."""
    for update in run.updates:
        if any(one.epoch == 0 and WINDOW in one.images for one in update.backwards):
            return _weights(run, update)[WINDOW:], "carried over" if update.carried else ""
    return torch.zeros(1), "dropped"


def _word(value: float, words: Mapping[float, str]) -> str:
    """The word of the number that `value` equals."""
    near = (word for one, word in words.items() if abs(value - one) <= TOLERANCE * abs(one))
    return next(near, "other")


def _full_window(runs: Runs) -> tuple[float, str]:
    """Sum of the images' weights in a full window; 1 is right."""
    size = _weights(runs["full"], runs["full"].updates[0]).sum().item()
    return size, _word(size, {1: "right", STEPS: "not divided"})


def _short_window(runs: Runs) -> tuple[float, str]:
    """Sum of the images' weights of a last window of two micro-batches; 1 is right."""
    weights, elsewhere = _second_window(runs["short"])
    size = weights.sum().item()
    words = {1: "right", 2 / 3: "divided by a full window", 2: "not divided"}
    return size, elsewhere or _word(size, words)


def _unequal(runs: Runs, problem: str = "unequal") -> tuple[float, str]:
    """The weight of the only image, or token, in a micro-batch, relative to one of 4."""
    weights, elsewhere = _second_window(runs[problem])
    share = (weights[2 * BATCH_SIZE] / weights[0]).item()
    return share, elsewhere or ("right" if abs(share - 1) <= TOLERANCE else "mean of means")


def _clipping(runs: Runs) -> tuple[float, str]:
    """Relative difference from the true gradient of a window, clipped once; 0 is right."""
    run = runs["clipping"]
    model, update = run.probe.model, run.updates[0]
    images, labels = (torch.cat(parts) for parts in zip(*run.probe.batches[:STEPS], strict=True))
    truth = torch.autograd.grad(F.cross_entropy(model(images), labels), model.weight)[0]
    clipped = truth * CLIP / truth.norm(), truth.clamp(-CLIP, CLIP)
    error = min(relative_difference(update.gradient, one) for one in clipped)
    if error < TOLERANCE:
        return 0.0, "right"
    between = any(
        earlier.after is not None and not torch.equal(earlier.after, later.before)
        for earlier, later in pairwise(update.backwards)
    )
    return error, "each micro-batch" if between else "other"


def _schedule(runs: Runs) -> tuple[float, str]:
    """Steps of the schedule per update; 1 is right."""
    steps = len(runs["full"].schedule) / len(runs["full"].updates)
    return steps, "right" if steps == 1 else "each micro-batch" if steps > 1 else "each epoch"


def _updates(runs: Runs) -> tuple[float, str]:
    """Updates per epoch of five micro-batches; 2 is right."""
    updates = len(runs["short"].updates) / Task.epochs
    return updates, "right" if updates == 2 else "too few"


def _logged_loss(runs: Runs) -> tuple[float, str]:
    """The loss reported for an epoch, relative to the mean over its images; 1 is right."""
    for name in ("full", "unequal"):
        images, labels = runs[name].probe.batches.dataset.tensors
        losses = F.cross_entropy(runs[name].probe.model(images), labels, reduction="none")
        truth, logged = losses.mean().item(), torch.as_tensor(runs[name].returned[0]).mean().item()
        words = {truth: "right", truth / STEPS: "divided by the steps"}
        words |= {truth * STEPS: "multiplied by the steps"}
        if name == "unequal":
            for size, unit in ((BATCH_SIZE, "micro-batches"), (WINDOW, "updates")):
                means = torch.stack([part.mean() for part in losses.split(size)])
                words[means.mean().item()] = f"mean of {unit}"
        verdict = _word(logged, words)
        if verdict != "right":
            break
    return logged / truth, verdict


PROBES: dict[str, Callable[[Runs], tuple[float, str]]] = {
    "full window": _full_window,
    "short last window": _short_window,
    "unequal micro-batches": _unequal,
    "unequal tokens": partial(_unequal, problem="tokens"),
    "clipping": _clipping,
    "schedule": _schedule,
    "updates per epoch": _updates,
    "logged loss": _logged_loss,
}
"""What is measured; each function's first line says in which unit."""


def main(package: str, out: str) -> None:
    """Observe what needs a package; write the rows as JSON to the file `out`."""
    names = [name for name in LIBRARIES if package_of(name) == package]
    number = torch.__version__.partition("+")[0]
    found = {"torch": number, "rows": [row for name in names for row in observe(name)]}
    Path(out).write_text(json.dumps(found))
