"""Modules under several names, tied weights. Truths: torch's AdamW, the scores, identity."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune import hypernet
from selftune.functionalize import flat

FIXED: dict[str, Any] = {"lr": 3e-2, "weight_decay": 0.0}
PLAIN: dict[str, Any] = {"tune": (), "guard": False, "probe": False}


class Coder(nn.Module):
    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words, self.layer = words, nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.words(tokens))).mean(1)


class Translator(nn.Module):
    """Encoder, decoder and output layer with one embedding, as in T5."""

    def __init__(self, *, shared: bool = True, tied: bool = True) -> None:
        super().__init__()
        self.shared = nn.Embedding(20, 8)
        self.encoder = Coder(self.shared)
        self.decoder = Coder(self.shared if shared else nn.Embedding(20, 8))
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.decoder.words.weight = self.head.weight = self.shared.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.encoder(source) + self.decoder(target))


def batches(count: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(20, (2, 16, 5), generator=generator) for _ in range(count)]
    return [(a, b, (a[:, 0] + b[:, 0]) % 20) for a, b in draws]


KINDS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize(("shared", "tied"), KINDS)
def test_training_is_torchs(shared: bool, tied: bool) -> None:
    data, models = batches(10), []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Translator(shared=shared, tied=tied))
    opt, losses = torch.optim.AdamW(models[0].parameters(), **FIXED), []
    for a, b, y in data * 3:
        opt.zero_grad()
        loss = F.cross_entropy(models[0](a, b), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    names, params = zip(*models[1].named_parameters(), strict=True)
    tuner = st.Tuner(
        models[1], F.cross_entropy, hparams=FIXED, schedule="constant", compile=False, **PLAIN
    )
    result = tuner.fit(data, data[:2], epochs=3, progress=False)
    torch.testing.assert_close(
        torch.tensor(result.history["train_loss"][-1]), torch.tensor(losses[-1]).double(),
        rtol=1e-4, atol=1e-5, check_dtype=False,
    )  # fmt: skip
    after = dict(models[1].named_parameters())
    assert [*after] == [*names]
    assert all(after[n] is p for n, p in zip(names, params, strict=True))  # not replaced
    with torch.no_grad():
        found = sum(F.cross_entropy(models[1](a, b), y).item() for a, b, y in data[:2]) / 2
    assert found == pytest.approx(result.best_loss, rel=1e-5)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.right, self.out = self.left, nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.left(x), self.right(x.flip(1))], 1))


def test_callbacks_see_the_scored_model_which_stays_usable() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 16, 4)
    data = [(part, part.sum(1, keepdim=True) + 3) for part in x]
    model, pairs = Siamese(), []

    def look(progress: Any) -> None:
        with torch.no_grad():
            model.eval()
            loss = sum(F.mse_loss(model(a), b).item() for a, b in data[16:]) / 4
        pairs.append((progress.scores["loss"], loss))

    st.Tuner(model, F.mse_loss, compile=False).fit(
        data[:16], data[16:], epochs=4, callbacks=[look], progress=False
    )
    assert all(loss == pytest.approx(score, rel=1e-5) for score, loss in pairs)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), 0.01)
    model(data[0][0]).sum().backward()
    opt.step()
    st.Tuner(model, F.mse_loss, compile=False).fit(data[:16], data[16:], epochs=2, progress=False)


def test_functions_of_weights_may_be_called_again() -> None:
    torch.manual_seed(0)
    model, (a, b, _) = Translator(), batches(1)[0]
    expected = model(a, b)
    weights, call = flat(model)
    for factor in (1.0, 2.0, 1.0):
        found = call(weights * factor, a, b)
    torch.testing.assert_close(found, expected)


def test_conversion_keeps_what_is_shared() -> None:
    torch.manual_seed(0)
    model, (a, b, y) = Translator(), batches(1)[0]
    model.head = nn.Sequential(st.nn.Dropout(0.1), model.head)
    names = [n for n, _ in model.named_parameters()]
    net = hypernet.convert(model).train()
    opt = torch.optim.SGD(net.weights(), 0.1)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(a, b), y).backward()
        opt.step()
    plain = net.revert()
    assert [n for n, _ in plain.named_parameters()] == names
    assert plain.head[1].weight is plain.shared.weight
    assert isinstance(plain.shared.weight, nn.Parameter)


def test_dropped_weights_of_a_shared_module() -> None:
    layer = st.nn.DropConnect(nn.Sequential(*[nn.Linear(4, 4)] * 2), 0.5).train()
    before = list(layer.parameters())
    layer(torch.randn(3, 4)).sum().backward()
    assert all(p is q for p, q in zip(layer.parameters(), before, strict=True))
    assert all(p.grad is not None for p in before)
