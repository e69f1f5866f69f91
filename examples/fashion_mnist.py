"""A self-tuned convolutional network on Fashion-MNIST, with one compiled graph for each step.

``st.Tuner`` runs the loop: it trains on one part of the training images, tunes learning rate,
momentum and weight decay on the other, logs to TensorBoard and saves a checkpoint every epoch.
``--resume`` continues an interrupted run. The network, with BatchNorm and dropout, its loss and the
DataLoaders are ordinary PyTorch. The test images are used for the final evaluation only.

    python examples/fashion_mnist.py [--device cuda] [--epochs 10] [--resume] [--quick]

The images come from ``fashion_mnist.npz`` in ``--data-dir`` (or in the folder ``SELFTUNE_DATA``) if
it exists; otherwise torchvision downloads them.
"""

import argparse
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import selftune as st

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-dir", default=os.environ.get("SELFTUNE_DATA", "data"))
parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
parser.add_argument("--optimizer", choices=("SGD", "Adam", "AdamW", "RMSprop"), default="AdamW")
parser.add_argument("--lr", type=float, default=1e-3, help="initial learning rate")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--amp", action="store_true", help="forward passes in bfloat16")
parser.add_argument("--compile", choices=("auto", "always", "never"), default="auto")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--log-dir", default="runs/fashion_mnist")
parser.add_argument("--resume", action="store_true", help="resume the run in --log-dir")
parser.add_argument("--quick", action="store_true", help="a short run of a few seconds")
args = parser.parse_args()
logging.basicConfig(format="%(message)s")
logging.getLogger("selftune").setLevel("INFO")
torch.manual_seed(args.seed)


def images(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, standardised, with their labels."""
    if (folder / "fashion_mnist.npz").exists():
        with np.load(folder / "fashion_mnist.npz") as data:
            arrays = [torch.from_numpy(data[k]) for k in ("x_train", "y_train", "x_test", "y_test")]
    else:
        from torchvision.datasets import FashionMNIST

        sets = [FashionMNIST(folder, train=train, download=True) for train in (True, False)]
        arrays = [part for one in sets for part in (one.data, one.targets)]
    parts = [(a.float().unsqueeze(1) / 255 - 0.286) / 0.353 for a in arrays[::2]]
    return tuple(TensorDataset(x, y.long()) for x, y in zip(parts, arrays[1::2], strict=True))


def make_model() -> nn.Module:
    """Two convolutions with BatchNorm, two linear layers with dropout: 106,218 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10),
    )  # fmt: skip


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of correct predictions."""
    return (output.argmax(1) == target).float().mean()


# Data: nine tenths of the training images to train on, one tenth to tune on.
train_images, test_images = images(Path(args.data_dir))
if args.quick:
    train_images = TensorDataset(*train_images[:5000])
held = len(train_images) // 10
parts = random_split(
    train_images, [len(train_images) - held, held], torch.Generator().manual_seed(0)
)
options = dict(batch_size=args.batch_size, shuffle=True, num_workers=args.workers,
               pin_memory=args.device.startswith("cuda"))  # fmt: skip
train, val = (DataLoader(part, **options) for part in parts)

# Train: this replaces the loop, the optimizer, the scheduler and the search for their settings.
model = make_model().to(args.device)
tuner = st.Tuner(
    model,
    F.cross_entropy,
    rule=getattr(st.rules, args.optimizer)(),
    hparams={"lr": args.lr},
    metrics={"accuracy": accuracy},
    amp=args.amp,
    compile={"auto": "auto", "always": True, "never": False}[args.compile],
)
result = tuner.fit(
    train, val, epochs=1 if args.quick else args.epochs, log_dir=args.log_dir, resume=args.resume
)

# Results. The model now holds the best averaged weights.
history = result.history
print(f"\n{result.ended} after {result.steps} steps")
print("\nhyperparameter      start →      end")
for name, end in result.hparams.items():
    if name in history:
        print(f"{name:16} {history[name][0]:8.3g} → {end:8.3g}")

model.eval()
with torch.no_grad():
    batches = [(x.to(args.device), y.to(args.device)) for x, y in DataLoader(test_images, 1000)]
    found = [(F.cross_entropy(model(x), y), accuracy(model(x), y)) for x, y in batches]
    loss, right = torch.tensor(found).mean(0).tolist()
print(f"\ntest loss {loss:.3f}, accuracy {right:.1%}")

# The tuned schedule as plain data: st.replay(torch_optimizer, "schedule.json") applies it.
schedule = Path(args.log_dir) / "schedule.json"
result.schedule.save(schedule)
print(f"schedule of {len(json.loads(schedule.read_text())['values'])} hyperparameters: {schedule}")
print(f"Look at the run:  tensorboard --logdir {args.log_dir}")
