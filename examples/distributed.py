"""Several processes train one model, with the hyperparameters of a single process.

Each process (rank) takes its part of every batch; gradients are averaged. On CPUs:

    torchrun --nproc-per-node 2 examples/distributed.py [--quick]

On a machine with GPUs, one rank for each (nccl instead of gloo):

    torchrun --nproc-per-node gpu examples/distributed.py --device cuda

On several machines run the same command on each, with the address of any one of them:

    torchrun --nnodes 2 --nproc-per-node gpu --rdzv-backend c10d --rdzv-endpoint HOST:29500
    examples/distributed.py --device cuda

With --parallel fsdp each rank holds only a part of the weights and of their state, for models that
do not fit on one GPU.

Without torchrun the script trains in one process, to nearly the same hyperparameters (BatchNorm
normalises by each rank's part of a batch; without it they are equal up to rounding). Ctrl-C saves
a checkpoint; the same command resumes it, on any number of ranks.
"""

import argparse
import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--batch-size", type=int, default=64, help="over all ranks")
parser.add_argument("--device", default="cpu", help="cpu, or cuda for the GPU of each rank")
parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"])
parser.add_argument("--log-dir", default="runs/distributed")
parser.add_argument("--quick", action="store_true", help="a short run of a few seconds")
args = parser.parse_args()
launched = "RANK" in os.environ  # by torchrun
if args.device == "cpu":
    torch.set_num_threads(1)

# The same on all ranks: seed, data, model.
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
data = TensorDataset(images, torch.tensor(digits.target))
train, val = torch.utils.data.random_split(data, [1400, 397])
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
)

tuner = st.Tuner(
    model,
    F.cross_entropy,
    metrics={"accuracy": lambda output, y: (output.argmax(1) == y).float().mean()},
    parallel=args.parallel if launched else None,
    device=args.device,
)
result = tuner.fit(
    DataLoader(train, args.batch_size, shuffle=True),
    DataLoader(val, args.batch_size, shuffle=True),
    epochs=3 if args.quick else args.epochs,
    log_dir=args.log_dir,
    resume=True,
)
if os.environ.get("RANK", "0") == "0":  # every rank holds the result
    print(f"\n{result}")
    print(f"accuracy {result.history['score/accuracy'][-1]:.1%}")
