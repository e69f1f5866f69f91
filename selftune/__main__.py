"""The console command, also ``python -m selftune``: ``selftune show RUN…``, ``selftune demo``."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selftune.monitor.reading import Log, read, runs_in
from selftune.monitor.report import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(prog="selftune", description="Inspect self-tuned runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="summarise and compare runs, even unfinished ones")
    show.add_argument("runs", nargs="+", help="log directories, their parents, or JSON-lines files")
    demo = commands.add_parser("demo", help="tune an MLP on scikit-learn's digits, in seconds")
    demo.add_argument("--log-dir", default="runs/demo")
    demo.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # of an encoding without arrows, on Windows
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _show(args.runs) if args.command == "show" else _demo(args.log_dir, args.epochs)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough; Python would fail again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _show(runs: Sequence[str]) -> int:
    logs: dict[str, Log] = {}
    status = 0
    for run in _expanded(runs):
        try:
            for name, log in read(run).by_optimizer().items():
                logs[f"{run}: {name}" if name else run] = log
        except (OSError, ValueError) as error:
            print(error if run in str(error) else f"{run}: {error}", file=sys.stderr)
            status = 1
    for run, log in logs.items():
        lines, why = log.lines(), log.reasons()
        others = ", ".join(log.curves) or "an empty log"
        shown = table(lines) if lines else f"no hyperparameters, only {others}"
        print("\n".join([run, shown, *(["", why] if why else []), ""]))
    if len(logs) > 1:
        print("validation loss and final hyperparameters")
        losses = {run: log.loss() for run, log in logs.items()}
        for run, loss in sorted(losses.items(), key=lambda item: _rank(item[1])):
            ends = ", ".join(f"{one.name}={one.end:.3g}" for one in logs[run].lines())
            print(f"{'–' if loss is None else f'{loss:.4g}':>8}  {run}  {ends}")
    return status


def _rank(loss: float | None) -> tuple[bool, float]:
    """Runs without a loss, or with one that is not a number, come last."""
    unknown = loss is None or math.isnan(loss)
    return unknown, math.inf if loss is None or unknown else loss


def _expanded(runs: Sequence[str]) -> list[str]:
    """The given runs; a folder without a run is replaced by the runs below it."""
    folders: dict[str, None] = {}
    for run in runs:
        below = [str(path) for path in runs_in(run)] if os.path.isdir(run) else []
        folders |= dict.fromkeys([run] if not below or str(Path(run)) in below else below)
    return list(folders)


def _demo(folder: str, epochs: int) -> int:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("selftune demo needs scikit-learn: pip install scikit-learn", file=sys.stderr)
        return 1
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from selftune.tuner import Tuner

    if (Path(folder) / "last.pt").exists():
        print(f"selftune demo: {folder} contains a run: pass another --log-dir", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    test, rest = order[:360], order[360:]
    data = TensorDataset(x[rest], y[rest])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    tuner = Tuner(model, nn.CrossEntropyLoss())
    loader = DataLoader(data, 64, shuffle=True)
    result = tuner.fit(loader, val=0.2, epochs=epochs, log_dir=folder)
    with torch.no_grad():
        right = float((model.eval()(x[test]).argmax(1) == y[test]).float().mean())
    print(
        f"validation loss {result.best_loss:.4g}; {100 * right:.1f} % accuracy on {len(test)} "
        "test digits\n"
    )
    print(replace(result, folder=None).report())
    result.report()  # the files, last: the folder may not be writable
    print(f"\nReport:  {Path(folder) / 'report.html'}\nCharts:  tensorboard --logdir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
