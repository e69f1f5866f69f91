"""Shrinks a network that is too wide and deep for Fashion-MNIST, in one run.

Channels and hidden units have gates, residual blocks can be removed, one layer chooses its kernel
size, and batches follow the gradient noise scale. ``structure.Goal`` closes units early in the run
until half of the parameters and multiply-adds remain, ``st.Mixture`` chooses the optimizer and
tunes its hyperparameters on validation batches, and ``prune`` returns the smaller network in plain
torch.

    python examples/structure.py [--epochs 3] [--budget 0.5] [--quick]

The images come from ``fashion_mnist.npz`` in ``--data-dir`` (or the folder ``SELFTUNE_DATA``)
if it exists, else torchvision downloads them.
"""

import argparse
import copy
import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import selftune as st

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-dir", default=os.environ.get("SELFTUNE_DATA", "data"))
parser.add_argument("--images", type=int, default=20_000, help="training images")
parser.add_argument("--epochs", type=int, default=3, help="at the initial batch size")
parser.add_argument("--batch-size", type=int, default=32, help="initial size")
parser.add_argument("--budget", type=float, default=0.5, help="final fraction of the size")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--log-dir", default="runs/structure")
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


def block(channels: int) -> nn.Module:
    """The branch of a residual connection, with gated channels inside."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        st.structure.Gate(channels), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels),
    )  # fmt: skip


def make_model(width: int, blocks: int) -> nn.Module:
    """A choice of kernels, residual blocks, and a hidden layer."""
    kernels = [nn.Conv2d(1, width, k, stride=2, padding=k // 2) for k in (3, 5, 7)]
    return nn.Sequential(
        st.structure.Choice(kernels), nn.BatchNorm2d(width), nn.ReLU(),
        *(st.structure.Optional(block(width)) for _ in range(blocks)),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        st.structure.Gate(2 * width), nn.Flatten(), nn.Linear(2 * width * 49, 64), nn.ReLU(),
        st.structure.Gate(64), nn.Linear(64, 10),
    )  # fmt: skip


def size(net: nn.Module) -> dict[str, int]:
    """Parameters, and multiply-adds for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(net).eval()(torch.zeros(1, 1, 28, 28))
    return {
        "parameters": sum(p.numel() for n, p in net.named_parameters() if "gates" not in n),
        "multiply-adds": counter.get_total_flops() // 2,
    }


# Data: nine tenths to train on, one tenth to tune on.
train_images, test_images = images(Path(args.data_dir))
count = 1500 if args.quick else args.images
train_images = TensorDataset(*train_images[:count])
held = count // 10
train, val = random_split(train_images, [count - held, held], torch.Generator().manual_seed(0))
writer = SummaryWriter(args.log_dir)  # one run: the optimizer, gates, sizes, noise scale
batches = st.structure.Batches(
    train, start=args.batch_size, most=128, drop_last=True, recorder=writer
)  # fmt: skip
loader = DataLoader(train, batch_sampler=batches)
val_x, val_y = (torch.stack(list(column)) for column in zip(*val, strict=True))

# Model and run. Batches may grow, so steps are counted at the initial batch size.
model = make_model(width=8 if args.quick else 16, blocks=2)
epochs = 1 if args.quick else args.epochs
steps = epochs * len(batches)
rules = [st.rules.SGD(), st.rules.AdamW(), st.rules.Lion()]
opt = st.Mixture(
    st.structure.parameter_groups(model), rules, lr=3e-3, weight_decay=0.01, total_steps=steps,
    model=model, log_dir=writer,
)  # fmt: skip
example = train_images.tensors[0][:1]
goal = st.structure.Goal(
    model, example, args.budget, of=("parameters", "multiply_adds"), total_steps=steps,
    recorder=writer,
)  # fmt: skip
chooser = st.structure.Chooser(model, steps, recorder=writer)
start = {**size(model), "batch size": batches.size}
given = opt.hparams["lr"]


def validation() -> Tensor:
    """The loss of a random validation batch."""
    at = torch.randint(len(val_x), (256,))
    return F.cross_entropy(model(val_x[at]), val_y[at])


taken = 0
while taken < steps:
    for x, y in loader:
        opt.zero_grad()
        sweeping = opt.sweeping  # at rates that may be much too high
        for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
            loss = F.cross_entropy(model(part), target) / 2
            loss.backward()
            if not sweeping:
                batches.scale.micro_batch(model.parameters())
        if not sweeping:
            batches.scale.whole_batch(len(x))
        opt.step()
        opt.hyper_step(validation)
        if goal.step(validation):
            opt.sync(weights=False)
        if chooser.step(validation) and chooser.made:
            opt.sync(weights=False)
        taken += 1
        if taken == steps:
            break


def accuracy(net: nn.Module) -> float:
    """Test accuracy in percent."""
    found = [(net(x).argmax(1) == y).float() for x, y in DataLoader(test_images, 1000)]
    return 100 * float(torch.cat(found).mean())


with opt.averaged(), torch.no_grad():
    model.eval()
    small = st.structure.prune(
        model, example, loss=lambda net: F.cross_entropy(net(val_x), val_y)
    )  # fmt: skip
    right = accuracy(small)
opt.finish()
writer.close()

end = {**size(small), "batch size": batches.size}
print(f"\n{small}\n\n{'':28}   start →      end")
for name, value in start.items():
    print(f"{name:26} {value:9,} → {end[name]:8,}")
for name, (left, whole) in goal.open().items():
    print(f"{'gates of ' + name:26} {whole:9,} → {left:8,}")
print(f"{'lr':26} {given:9.3g} → {opt.hparams['lr']:8.3g}")
print(f"{'kernel':26} {'3, 5, 7':>9} → {small[0].kernel_size[0]:8}")
chosen = str(opt.rule).partition("(")[0].rpartition(".")[2]
print(f"{'optimizer':26} {f'of {len(rules)}':>9} → {chosen:>8}")
print(f"\nnoise scale {batches.scale.value:.0f}, test accuracy {right:.1f} %")
print(f"Look at the run:  tensorboard --logdir {args.log_dir}")
