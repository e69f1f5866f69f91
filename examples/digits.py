"""The one-line change, side by side: digits with noisy labels, plain torch and self-tuned.

A small network learns scikit-learn's 8×8 digits from 1,000 training images, of whose labels
15 % are wrong, so that it over-fits unless its hyperparameters are right. The first loop
is plain PyTorch at common defaults; the second is the same loop with ``st.SGD`` in place of
``torch.optim.SGD`` and one line that hands it validation batches. With ``--optimizer AdamW`` the
default rate of 1e-3 happens to be nearly the best one, and the two end about alike.

    python examples/digits.py [--optimizer SGD] [--lr 0.01] [--steps 2000] [--quick]
"""

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import selftune as st

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--optimizer", choices=("SGD", "Adam", "AdamW", "RMSprop"), default="SGD")
parser.add_argument("--lr", type=float, help="learning rate at the start [SGD: 0.01, others: 1e-3]")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--log-dir", default="runs/digits")
parser.add_argument("--quick", action="store_true", help="finish in seconds, to see it run")
args = parser.parse_args()
torch.set_num_threads(1)  # the network is too small to be worth sharing
steps = 200 if args.quick else args.steps
lr = args.lr or (1e-2 if args.optimizer == "SGD" else 1e-3)

# Data: 1,000 images to train on, 400 to validate, 397 to test.
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.3
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order]
train, val, test = slice(0, 1000), slice(1000, 1400), slice(1400, None)
noisy = labels[train].clone()
wrong = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.15
noisy[wrong] = torch.randint(10, (int(wrong.sum()),), generator=torch.Generator().manual_seed(2))


def batches(inputs: Tensor, targets: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(inputs), generator=generator).split(args.batch_size):
            yield inputs[index], targets[index]


def make_model() -> nn.Module:
    """The same initial weights every time."""
    torch.manual_seed(args.seed)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


@torch.no_grad()
def evaluate(model: nn.Module, part: slice) -> tuple[float, float]:
    """Loss and accuracy on clean labels."""
    output = model(images[part])
    accuracy = (output.argmax(1) == labels[part]).float().mean().item()
    return F.cross_entropy(output, labels[part]).item(), accuracy


# 1. Plain PyTorch.
plain = make_model()
opt = getattr(torch.optim, args.optimizer)(plain.parameters(), lr=lr)
train_batches = batches(images[train], noisy, args.seed)
for _ in tqdm(range(steps), desc=f"torch.optim.{args.optimizer}"):
    x, y = next(train_batches)
    opt.zero_grad()
    F.cross_entropy(plain(x), y).backward()
    opt.step()

# 2. The same loop, self-tuned: another optimizer, and a validation batch for it.
tuned = make_model()
opt = getattr(st, args.optimizer)(
    tuned.parameters(), lr=lr, total_steps=steps, log_dir=args.log_dir
)
start = opt.hparams
train_batches = batches(images[train], noisy, args.seed)
val_batches = batches(images[val], labels[val], args.seed)
progress = tqdm(range(steps), desc=f"selftune.{args.optimizer}")
for step in progress:
    x, y = next(train_batches)
    opt.zero_grad()
    loss = F.cross_entropy(tuned(x), y)
    loss.backward()
    opt.step()
    opt.report(loss)
    xv, yv = next(val_batches)
    opt.hyper_step(lambda: F.cross_entropy(tuned(xv), yv))  # noqa: B023 - called at once
    if step % 100 == 0:
        progress.set_postfix(lr=f"{opt.hparams['lr']:.2g}")

print("\nhyperparameter      start →      end")
for name, end in opt.hparams.items():
    print(f"{name:16} {start[name]:8.3g} → {end:8.3g}")

print("\n                     validation loss   test loss   test accuracy")
rows = [(f"torch.optim.{args.optimizer}", evaluate(plain, val), evaluate(plain, test))]
with opt.averaged():  # evaluate, and save, at the averaged weights
    rows.append((f"selftune.{args.optimizer}", evaluate(tuned, val), evaluate(tuned, test)))
for label, (val_loss, _), (test_loss, accuracy) in rows:
    print(f"{label:20} {val_loss:16.3f} {test_loss:11.3f} {accuracy:15.1%}")

opt.finish()
print(f"\nLook at the run:  tensorboard --logdir {args.log_dir}")
