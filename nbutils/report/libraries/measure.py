"""What one library does to the weight of every image, measured by watching a short training.

Micro-batches have 4 images, and 3 make a window. Which went into an update, and how much each image
weighed in it, is read off the gradient (`nbutils.accumulation.check.probe` says how).
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
import torch.nn.functional as F

from nbutils.accumulation.check.image_weights import Window
from nbutils.accumulation.check.probe import ACCUMULATION_STEPS, BATCH_SIZE, EPOCHS, Probe, cut
from nbutils.accumulation.check.watch import Run, Update, watch
from nbutils.accumulation.vectors import relative_difference
from nbutils.report.libraries import hugging_face, scripts

WINDOW = ACCUMULATION_STEPS * BATCH_SIZE
TOLERANCE, CLIP = 1e-4, 1.0
NO_TOKENS = {"unequal tokens": "not its job"}
NO_LOG = NO_TOKENS | {"logged loss": "not its job"}
IGNITE = NO_TOKENS | {"clipping": "not offered", "schedule": "not its job"}
FASTAI = NO_TOKENS | {"schedule": "by fraction of training", "logged loss": "smoothed"}
LIBRARIES: dict[str, tuple[Callable[[Run, float | None], None], dict[str, str]]] = {
    "this project": (scripts.this_project, {}),
    "accelerate": (hugging_face.accelerate, NO_LOG),
    "accelerate, loader not prepared": (partial(hugging_face.accelerate, prepare=False), NO_LOG),
    **{
        f"transformers, {name}": (partial(hugging_face.transformers, make=make), {})
        for name, make in hugging_face.MODELS.items()
    },
    "lightning": (scripts.lightning, NO_TOKENS),
    "keras": (scripts.keras, {}),
    "pytorch-ignite": (scripts.ignite, IGNITE),
    "fastai": (scripts.fastai, FASTAI),
    "poutyne": (scripts.poutyne, NO_TOKENS),
    "composer": (scripts.composer, {}),
}
"""What trains, and verdicts to probes in place of those measured. Names are in the order of the
table: a package, or "package, variant"."""

NOT_MEASURED = "not its job", "not offered"
Runs = Callable[[str], Run]
"""`runs(problem)`: a library's training on a problem."""


def package_of(name: str) -> str:
    """The package of a library on PyPI; "" for this project."""
    package = name.partition(",")[0]
    return {"this project": "", "composer": "mosaicml"}.get(package, package)


def _problem(name: str) -> Probe:
    """What is trained; "tokens" ignores some labels, as those of padding are ignored."""
    probe = Probe({"clipping": "large", "tokens": "full"}.get(name, name))
    images, labels = probe.batches.dataset.tensors
    if name == "tokens":
        labels[1 - BATCH_SIZE :] = scripts.IGNORED
    if name == "clipping":
        # Micro-batches share images, or clipping the values of each would change nothing.
        images = images[torch.arange(len(images)) % BATCH_SIZE]
        labels = torch.arange(len(images)) // 5 % 3
    probe.batches = cut(images, labels)
    return probe


def observe(name: str) -> list[dict[str, object]]:
    """Run every probe with a library, in this process.

    One row per probe: `library`, `probe`, `measured` (None if it was not run), `verdict`.
    """
    train, answers = LIBRARIES[name]

    @cache
    def runs(problem: str) -> Run:
        with watch(_problem(problem)) as run:
            train(run, CLIP if problem == "clipping" else None)
        return run

    rows: list[dict[str, object]] = []
    for probe, measure in PROBES.items():
        measured, verdict = None, answers.get(probe, "")
        if verdict not in NOT_MEASURED:
            value, seen = measure(runs)
            measured = float(f"{value:.5g}")
            verdict = seen if seen == "right" else verdict or seen
        rows.append({"library": name, "probe": probe, "measured": measured, "verdict": verdict})
    return rows


def _word(value: float, words: Mapping[float, str]) -> str:
    """The word of the number that `value` equals; 1 is right."""
    words = {1: "right", **words}
    return next((words[one] for one in words if abs(value / one - 1) <= TOLERANCE), "other")


def _last_window(problem: str, runs: Runs) -> tuple[float, str]:
    """The sum of the images' weights in the first epoch's last window.

    Of "unequal" and "tokens" the weight of the only image, or token, in its last micro-batch,
    relative to one of 4.
    """
    run = runs(problem)
    for update in run.updates:
        passes = [one for one in update.backwards if one.epoch == 0]
        if any(WINDOW in one.images for one in passes):
            window = Window(run, Update(passes, update.gradient))
            relative = (window.weights[-1] / window.weights[0]).item()
            value = relative if problem in ("unequal", "tokens") else window.size
            words = {2 / 3: "divided by a full window", 2: "not divided", 3: "not divided"}
            words[BATCH_SIZE] = "mean of means"
            return value, "carried over" if update.carried else _word(value, words)
    return 0.0, "dropped"


def _clipping(runs: Runs) -> tuple[float, str]:
    """Relative difference from the true gradient of a window, clipped once; 0 is right."""
    run = runs("clipping")
    model, update = run.probe.model, run.updates[0]
    images, labels = (part[:WINDOW] for part in run.probe.batches.dataset.tensors)
    (truth,) = torch.autograd.grad(F.cross_entropy(model(images), labels), model.weight)
    clipped = truth * CLIP / truth.norm(), truth.clamp(-CLIP, CLIP)
    error = min(relative_difference(update.gradient, one) for one in clipped)
    if error < TOLERANCE:
        return 0.0, "right"
    return error, "each micro-batch" if update.changed_inside else "other"


def _schedule(runs: Runs) -> tuple[float, str]:
    """Steps of the schedule per update."""
    steps = len(runs("full").schedule) / len(runs("full").updates)
    return steps, "right" if steps == 1 else "each micro-batch" if steps > 1 else "each epoch"


def _updates(runs: Runs) -> tuple[float, str]:
    """Updates per epoch of five micro-batches; 2 is right."""
    updates = len(runs("short").updates) / EPOCHS
    return updates, "right" if updates == 2 else "too few"


def _logged_loss(runs: Runs) -> tuple[float, str]:
    """The loss reported for an epoch, relative to the mean over its images."""
    for run in (runs("full"), runs("unequal")):
        images, labels = run.probe.batches.dataset.tensors
        losses = F.cross_entropy(run.probe.model(images), labels, reduction="none").detach()
        words = {1 / ACCUMULATION_STEPS: "divided by the steps"}
        words[ACCUMULATION_STEPS] = "multiplied by the steps"
        for size, unit in ((BATCH_SIZE, "micro-batches"), (WINDOW, "updates")):
            means = torch.stack([part.mean() for part in losses.split(size)])
            words[(means.mean() / losses.mean()).item()] = f"mean of {unit}"
        share = (torch.as_tensor(run.returned[0]).mean() / losses.mean()).item()
        verdict = _word(share, words)
        if verdict != "right":
            break
    return share, verdict


PROBES: dict[str, Callable[[Runs], tuple[float, str]]] = {
    "full window": partial(_last_window, "full"),
    "short last window": partial(_last_window, "short"),
    "unequal micro-batches": partial(_last_window, "unequal"),
    "unequal tokens": partial(_last_window, "tokens"),
    "clipping": _clipping,
    "schedule": _schedule,
    "updates per epoch": _updates,
    "logged loss": _logged_loss,
}
"""What is measured, where 1 is right unless its function says otherwise."""
