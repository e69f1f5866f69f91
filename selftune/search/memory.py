"""Memory of finished runs: initial hyperparameters from the results on similar tasks."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from selftune._arguments import COUNT, FOLDER, NONE, TEXT, Kind, Number, That, check, checked
from selftune._files import write_text
from selftune.hparams import Hparam
from selftune.search._shape import Shape

log = logging.getLogger("selftune")

PRIOR = 0.2
"""Weight w₀ of the default start, in units of one run of the same task."""
NEAR = 1.0
"""Distance of tasks at which a run has weight e^(−1/2), such as sizes that differ by a factor e."""
POWER = {"SGD": 1.0, "RMSprop": 0.5, "Adam": 0.5, "AdamW": 0.5, "Lion": 0.5}
"""Power of the batch size in the learning rate if noise dominates, by rule."""


KINDS: dict[str, Kind] = {
    **dict.fromkeys(("kind", "task", "family", "rule"), TEXT),
    **dict.fromkeys(("examples", "inputs", "outputs", "steps", "batch"), Number(above=0)),
    "noise": Number(above=0) | NONE,
}
"""Valid values of the fields of a saved task."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Simple meta-features of a data set and of a training run.

    Attributes:
        kind: ``"table"``, ``"sequence"``, ``"images"``, ``"volumes"`` or ``"words"``.
        task: ``"classification"`` or ``"regression"``.
        examples: Number of training examples.
        inputs: Number of values in an example.
        outputs: Number of classes or targets.
        steps: Number of steps in a run.
        batch: Batch size.
        family: Family of the model.
        rule: Name of the update rule.
        noise: Gradient noise scale in examples, or None: the batch size above which a larger batch
            does not allow a higher learning rate.
    """

    kind: str
    task: str
    examples: int
    inputs: int
    outputs: int
    steps: int
    batch: int
    family: str = ""
    rule: str = "AdamW"
    noise: float | None = None

    @classmethod
    def of(cls, shape: Shape, examples: int, steps: int, batch: int, **more: Any) -> Task:
        """Create a task from the shape of a data set."""
        return cls(
            kind=shape.kind, task=shape.task, examples=examples, inputs=math.prod(shape.inputs),
            outputs=shape.outputs, steps=steps, batch=batch, **more,
        )  # fmt: skip

    def distance(self, other: Task) -> float:
        """Distance to another task: 0 if all features agree, infinite if the rules differ."""
        if self.rule != other.rule:
            return math.inf
        same = 2.0 * (self.kind != other.kind) + 2.0 * (self.task != other.task)
        same += 1.0 * (self.family != other.family)
        sizes = ("examples", "inputs", "outputs", "steps")
        logs = [math.log(getattr(self, n) / getattr(other, n)) for n in sizes]
        return same + math.sqrt(sum(x * x for x in logs) / len(logs))

    def rate_from(self, other: Task) -> float:
        """Factor that converts a learning rate of ``other`` to the batch size of this task.

        ``((1 + B_noise/B₀)/(1 + B_noise/B))^p``, with p = 1 for SGD and ½ for adaptive rules. Far
        below the noise scale the rate grows as B^p; far above it, it is constant.

        Source: McCandlish et al. 2018, equation 2.11; Malladi et al. 2022 for the power of Adam.
        """
        noise = self.noise if self.noise is not None else other.noise
        if noise is None:
            gain = self.batch / other.batch
        else:
            gain = (1 + noise / other.batch) / (1 + noise / self.batch)
        return float(gain ** POWER.get(self.rule, 0.5))


class Memory:
    """A folder of finished runs that provides initial hyperparameters for new runs.

    Raw values (logs or log-odds) of similar runs are averaged, weighted by similarity, together
    with the default start z₀::

        z₀ ← z₀ + Σ wᵢ (zᵢ − z₀) / (w₀ + Σ wᵢ),   wᵢ = exp(−distance²/2)

    which is a Reptile step towards the values that similar tasks converged to. Each run is stored
    in its own file, so several processes can write at the same time; unreadable files are skipped.

    Args:
        path: The folder; created when the first run is stored.

    Examples:
        >>> import tempfile, selftune.search as search
        >>> memory = search.Memory(tempfile.mkdtemp())
        >>> task = search.Task(kind="table", task="regression", examples=500, inputs=8, outputs=1,
        ...                    steps=1000, batch=32)
        >>> memory.remember(task, {"lr": 0.01}, value=0.3)
        >>> round(memory.start(task, {"lr": 0.001})["lr"], 4)
        0.0068

    Source: Nichol et al. 2018 (Reptile); Feurer et al. 2015 (meta-features).
    """

    @checked(path=FOLDER)
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def remember(
        self,
        task: Task,
        hparams: Mapping[str, float],
        *,
        value: float,
        params: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Store a finished run.

        Args:
            task: The task of the run.
            hparams: Final hyperparameters of the run.
            value: Validation loss of the run.
            params: Parameters selected by a search.
            schedule: Trajectory of the hyperparameters, as plain data.
            name: Replaces an earlier run of this name, as of a search that is continued.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        entry = {
            "task": asdict(task), "hparams": dict(hparams), "value": value,
            "params": dict(params or {}), "schedule": schedule,
        }  # fmt: skip
        write_text(self.path / f"{name or uuid.uuid4().hex}.json", json.dumps(entry))

    def runs(self) -> list[dict[str, Any]]:
        """All stored runs that can be read, the latest first."""
        entries = []
        paths = {path: (_age(path), path.name) for path in self.path.glob("*.json")}
        for path in sorted(paths, key=paths.__getitem__):
            try:
                entries.append(_entry(json.loads(path.read_text())))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                # A file truncated by a full disk does not affect the others.
                log.warning("memory: %s is left out: %s", path, error)
        return entries

    def start(
        self,
        task: Task,
        hparams: Mapping[str, float],
        known: Mapping[str, Hparam] | None = None,
    ) -> dict[str, float]:
        """Initial hyperparameters for a new run, estimated from similar runs.

        Args:
            task: The task of the new run.
            hparams: Default initial values.
            known: Scales by hyperparameter name; logarithmic by default.

        Returns:
            Initial values for the names in ``hparams``; learning rates are converted to the batch
            size of this task.
        """
        near = [(math.exp(-((task.distance(e["task"]) / NEAR) ** 2) / 2), e) for e in self.runs()]
        start = dict(hparams)
        for name, value in hparams.items():
            some = [(w, self._of(e, name, task)) for w, e in near if name in e["hparams"]]
            some = [(w, v) for w, v in some if w > 1e-6 and v > 0]
            if not some:
                continue
            if value <= 0:  # off: log 0 is undefined, so only other runs count
                some, base = some[1:], some[0]
            else:
                base = (PRIOR, value)
            start[name] = _mean([base, *some], None if known is None else known.get(name))
        return start

    def best(self, task: Task, count: int = 3) -> list[dict[str, Any]]:
        """Parameters that searches selected for the most similar tasks, nearest first.

        Of tasks that are equally near, the latest come first.
        """
        runs = [e for e in self.runs() if e["params"] and math.isfinite(task.distance(e["task"]))]
        runs.sort(key=lambda e: task.distance(e["task"]))
        return [e["params"] for e in runs[:count]]

    @staticmethod
    def _of(entry: Mapping[str, Any], name: str, task: Task) -> float:
        value = float(entry["hparams"][name])
        return value * task.rate_from(entry["task"]) if name == "lr" else value


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # replaced by another process just now
        return -math.inf


def _entry(saved: dict[str, Any]) -> dict[str, Any]:
    """Check a saved run."""
    task = Task(**saved["task"])
    check(KINDS, vars(task))
    hparams = {str(n): float(v) for n, v in saved["hparams"].items()}
    check(dict.fromkeys(hparams, Number()), hparams)
    return {**saved, "task": task, "hparams": hparams, "params": dict(saved["params"].items())}


def _mean(weighed: list[tuple[float, float]], known: Hparam | None) -> float:
    """The mean in raw space."""
    values = torch.tensor([v for _, v in weighed], dtype=torch.float64, device="cpu")
    weights = torch.tensor([w for w, _ in weighed], dtype=torch.float64, device="cpu")
    if known is None:
        return float((values.log() @ weights / weights.sum()).exp())
    raw = known.bijection.inverse(values.clamp(known.lower, known.upper))
    return float(known.bijection.forward(raw @ weights / weights.sum()))


@checked(
    batch=COUNT, memory_there=Number(above=0), memory_here=Number(above=0),
    noise=That(lambda b: b is None or (Number().fits(b) and not b < 0), "a size, or None"),
)  # fmt: skip
def batch_for(batch: int, memory_there: int, memory_here: int, noise: float | None = None) -> int:
    """The batch size that fits a device with a different amount of memory.

    Args:
        batch: Batch size on the original device.
        memory_there: Memory of the original device in bytes.
        memory_here: Memory of this device in bytes.
        noise: Gradient noise scale in examples, beyond which the batch size is not increased; None
            or NaN if it is unknown.

    Examples:
        >>> batch_for(64, 8 * 2**30, 24 * 2**30)
        128
        >>> batch_for(64, 8 * 2**30, 24 * 2**30, noise=100)
        64
    """
    most = batch * memory_here / memory_there
    if noise is not None and not math.isnan(noise) and most > batch:
        most = max(batch, min(most, noise))
    return int(max(1, 2 ** math.floor(math.log2(most))))
