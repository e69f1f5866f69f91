"""An LSTM language model that tunes seven regularizers and its learning rate in one run.

Dropout of words, inputs, hidden states and outputs, DropConnect of the recurrent weights, and
penalties of activations (AR) and of their differences (TAR) are layers of ``st.nn``; learning rate,
momentum and weight decay belong to the optimizer. Tokens: characters of tiny Shakespeare, or words
of WikiText-2 with ``--wikitext2``. The last tenth of the text is used for the final evaluation
only.

    python examples/language_model.py [--steps 3000] [--wikitext2] [--device cuda] [--quick]

The text comes from ``--data-dir`` (or the folder in ``SELFTUNE_DATA``):
``tinyshakespeare.txt[.gz]``, or ``wikitext2.train.txt[.gz]``.
"""

import argparse
import gzip
import logging
import math
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-dir", default=os.environ.get("SELFTUNE_DATA", "data"))
parser.add_argument("--wikitext2", action="store_true", help="words instead of characters")
parser.add_argument("--vocabulary", type=int, default=10_000, help="number of distinct words")
parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--width", type=int, default=200)
parser.add_argument("--length", type=int, default=64, help="per sequence")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--log-dir", default=None, help="folder for TensorBoard and checkpoints")
parser.add_argument("--quick", action="store_true", help="a short run of a few seconds")
args = parser.parse_args()
logging.basicConfig(format="%(message)s")
logging.getLogger("selftune").setLevel("INFO")
torch.manual_seed(args.seed)
width = 32 if args.quick else args.width


def read(name: str) -> str:
    """Read a text file, compressed or not."""
    path = Path(args.data_dir) / name
    if path.exists():
        return path.read_text(encoding="utf-8")
    packed = path.with_name(f"{name}.gz")
    if not packed.exists():
        raise SystemExit(f"neither {path} nor {packed.name} found: pass --data-dir")
    return gzip.decompress(packed.read_bytes()).decode("utf-8")


text = read("wikitext2.train.txt" if args.wikitext2 else "tinyshakespeare.txt")
tokens = text.split() if args.wikitext2 else list(text)
known = [word for word, _ in Counter(tokens).most_common(args.vocabulary)]
index = {word: i for i, word in enumerate(known)}
unknown = index.get("<unk>", len(known) - 1)  # of WikiText-2; the rarest word of another text
shown = tokens[: 100_000 if args.quick else None]
codes = torch.tensor([index.get(token, unknown) for token in shown])
pieces = codes[: len(codes) // (args.length + 1) * (args.length + 1)].view(-1, args.length + 1)
tenth = len(pieces) // 10
parts = pieces[: -2 * tenth], pieces[-2 * tenth : -tenth], pieces[-tenth:]
train, val, test = (
    DataLoader(TensorDataset(p[:, :-1], p[:, 1:]), batch_size=32, shuffle=True, drop_last=True)
    for p in parts
)


class LanguageModel(nn.Module):
    """Two LSTM layers over embedded tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = st.nn.EmbeddingDropout(nn.Embedding(vocabulary, width), 0.05, "embedding")
        # One mask for all time steps of a sequence.
        self.input = st.nn.Dropout(0.05, "input", share=(1,))
        self.hidden = st.nn.Dropout(0.05, "hidden", share=(1,))
        self.output = st.nn.Dropout(0.05, "output", share=(1,))
        self.first = st.nn.DropConnect(nn.LSTM(width, width, batch_first=True), 0.05)
        self.second = nn.LSTM(width, width, batch_first=True)
        self.ar, self.tar = st.nn.ActivationPenalty(1e-3), st.nn.TemporalPenalty(1e-3)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, vocabulary, time)."""
        seen = self.hidden(self.first(self.input(self.words(x)))[0])
        last = self.ar(self.output(self.tar(self.second(seen)[0])))
        return self.head(last).transpose(1, 2)


model = LanguageModel(len(known))
tuner = st.Tuner(model, F.cross_entropy, hparams={"lr": 2e-3}, device=args.device)
result = tuner.fit(train, val, steps=60 if args.quick else args.steps, log_dir=args.log_dir)

print("\nhyperparameter      start →      end")
for name, end in result.hparams.items():
    if name in result.history:
        print(f"{name:16} {result.history[name][0]:8.3g} → {end:8.3g}")

model.eval()
with torch.no_grad():
    losses = [float(F.cross_entropy(model(x.to(args.device)), y.to(args.device))) for x, y in test]
loss = sum(losses) / len(losses)
unit = "word" if args.wikitext2 else "character"
print(f"\ntest loss {loss:.3f} nats/{unit}, perplexity {math.exp(loss):.1f}")
