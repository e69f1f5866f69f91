"""Everything that needs a GPU, by one command: its tests, then every table.

    python -m benchmarks.gpu [--device cuda] [--out gpu] [--quick]

The quickest come first, and each writes a file of its own as soon as it is done, so that what an
interrupted session has found is kept. ``--device cpu --quick`` runs the same lines on any machine,
as CI does. In all less than thirty minutes on one card.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from benchmarks.faces import row
from benchmarks.overhead import tuned

Step = Callable[[], None]


def commands(device: str, *, quick: bool) -> dict[str, list[str]]:
    """Arguments of Python, by the name of the file that gets what they print."""
    net = ["--only", "64-128"] if quick else []
    rounds = ["--rounds", "2" if quick else "15"]
    fused = ["-m", "benchmarks.fused", "--device", device, *net]
    found = {
        "machine": ["-m", "benchmarks.gpu", "--part", "machine", "--device", device],
        "waits": ["-m", "benchmarks.gpu", "--part", "waits", "--device", device],
        "amp": ["-m", "benchmarks.gpu", "--part", "amp", "--device", device],
        "overhead": ["-m", "benchmarks.overhead", "--device", device, *rounds],
        "tests": ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"],
        "fused memory": [*fused, "--part", "memory"],
        "populations": [*fused, "--part", "population", *rounds],
        "fused time": [*fused, "--part", "time", *rounds],
    }
    if not device.startswith("cuda"):  # where they would fail
        found["tests"].append("--collect-only")
    if quick:  # what compiles takes minutes on a CPU, and is run by the slow tests
        found = {n: c for n, c in found.items() if "fused" not in n and n != "populations"}
    return found


def machine(device: str) -> None:
    """What it was run on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")


def waits(device: str) -> None:
    """How often a step waits for the GPU: by torch's own count of synchronizing calls."""
    print(row(["step", "waits in 40 steps"]), row(["---"] * 2), sep="\n")
    batch = torch.randn(100, 1, 28, 28, device=device), torch.randint(10, (100,), device=device)
    for name in ("SGD", "AdamW"):
        step, _ = tuned(name, batch, every=20)
        print(row([f"st.{name}, hyper step every 20", str(_waits(step, device))]), flush=True)


def _waits(step: Step, device: str) -> int | str:
    if not device.startswith("cuda"):
        step()
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(40):
                step()
        return sum("synchroniz" in str(w.message) for w in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def amp(device: str) -> None:
    """Seconds of a fit in float32 and under bfloat16, and the loss where it ends."""
    print(row(["passes in", "s", "validation loss"]), row(["---"] * 3), sep="\n")
    for half in (False, True):
        torch.manual_seed(0)
        x = torch.randn(2048, 64)
        y = x[:, :8].argmax(1)
        net = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 8)).to(device)
        batches = list(zip(x.split(64), y.split(64), strict=True))
        tuner = st.Tuner(net, F.cross_entropy, amp=half, compile=False)
        start = time.perf_counter()
        result = tuner.fit(batches[:28], batches[28:], steps=200, progress=False)
        taken = time.perf_counter() - start
        name = "bfloat16" if half else "float32"
        print(row([name, f"{taken:.1f}", f"{result.best_loss:.4f}"]), flush=True)


PARTS: dict[str, Callable[[str], None]] = {"machine": machine, "waits": waits, "amp": amp}


def main() -> None:
    """Run everything, or one part in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU is to be seen: --device cpu --quick runs the same lines without one")
    if args.part:
        PARTS[args.part](args.device)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, command in commands(args.device, quick=args.quick).items():
        start = time.perf_counter()
        path = args.out / f"{name.replace(' ', '_')}.md"
        with path.open("w") as file:
            code = subprocess.run(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT
            ).returncode
        failed += [name] if code else []
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
