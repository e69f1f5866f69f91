"""A CNN on Fashion-MNIST that tunes its own augmentation, dropout and label smoothing.

Six augmentations run on the batch, on its device, independently of the loader's workers. Their
strengths are hyperparameters like the learning rate, and all are tuned in one run. The test images
are used for the final evaluation only.

    python examples/augmentation.py [--device cuda] [--epochs 30] [--images 10000] [--quick]

The images come from ``fashion_mnist.npz`` in ``--data-dir`` (or in the folder ``SELFTUNE_DATA``) if
it exists; otherwise torchvision downloads them.
"""

import argparse
import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-dir", default=os.environ.get("SELFTUNE_DATA", "data"))
parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
parser.add_argument("--images", type=int, default=10_000, help="training images")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--log-dir", default=None, help="folder for TensorBoard and checkpoints")
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


# Data: some images to train on, half as many others to tune on.
every, test = images(Path(args.data_dir))
count = min(1000 if args.quick else args.images, len(every) * 2 // 3)
order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
parts = order[:count], order[count : count + count // 2]
train, val = (
    DataLoader(TensorDataset(*every[part]), batch_size=100, shuffle=True, drop_last=True)
    for part in parts
)

# The only change: layers of st.nn instead of torch's, with one strength for each name.
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    st.nn.Dropout2d(0.05, name="dropout/first"),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    st.nn.Dropout(0.05, name="dropout/second"),
    nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
)  # fmt: skip
augment = st.nn.Augment(
    st.nn.Translate(0.02), st.nn.Scale(0.02), st.nn.Brightness(0.05), st.nn.Contrast(0.05),
    st.nn.Noise(0.05), st.nn.Cutout(0.1),
)  # fmt: skip
tuner = st.Tuner(
    model, st.nn.LabelSmoothing(0.02), augment=augment, hparams={"lr": 1e-3}, device=args.device
)
result = tuner.fit(train, val, epochs=2 if args.quick else args.epochs, log_dir=args.log_dir)

print("\nhyperparameter      start →      end")
for name, end in result.hparams.items():
    if name in result.history:
        print(f"{name:16} {result.history[name][0]:8.3g} → {end:8.3g}")

now = result.hparams["translate"]
around = [max(now / 2, 1e-3), now, min(2 * now, 0.95)]
losses = ", ".join(f"{loss:.3f} at {value:.3g}" for value, loss in
                   zip(around, tuner.predict(translate=around), strict=True))  # fmt: skip
print(f"\npredicted validation loss by translation: {losses}")

model.eval()
with torch.no_grad():
    batches = [(x.to(args.device), y.to(args.device)) for x, y in DataLoader(test, 1000)]
    outputs = [(model(x), y) for x, y in batches]
    loss = sum(float(F.cross_entropy(out, y)) for out, y in outputs) / len(outputs)
    right = sum(float((out.argmax(1) == y).float().mean()) for out, y in outputs) / len(outputs)
print(f"test loss {loss:.3f}, accuracy {right:.1%}")
