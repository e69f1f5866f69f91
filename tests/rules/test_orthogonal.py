"""Muon. Truths: torch.optim's Muon and AdamW, the paper written out, SVD, finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import selftune as st
from selftune import rules
from selftune.estimators import FiniteDifference, hypergradient
from selftune.update import Clock, Update

SHAPES = [(7, 5), (5, 7), (6, 6), (8, 2, 3)]


def values_of(**options: object) -> dict:
    return {**rules.Muon.defaults, "decay": 0.0, **options}


def written_out(g: Tensor, b: Tensor, *, nesterov: bool, adjust: str) -> tuple[Tensor, Tensor]:
    """Direction and momentum by the equations, through the singular values.

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X maps a singular value s to as + bs³ + cs⁵.
    """
    b = 0.95 * b + 0.05 * g
    n = (0.95 * b + 0.05 * g if nesterov else b).reshape(len(g), -1)
    u, s, v = torch.linalg.svd(n / n.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = n.shape
    scale = 0.2 * math.sqrt(max(rows, columns))
    if adjust == "original":
        scale = math.sqrt(max(1, rows / columns))
    return scale * (u * s @ v).reshape(g.shape), b


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_its_equations(shape: tuple, nesterov: bool, adjust: str) -> None:
    torch.manual_seed(0)
    update = Update(rules.Muon())
    values = values_of(nesterov=nesterov, adjust_lr_fn=adjust, lr=0.03, weight_decay=0.2)
    ours = theirs = torch.randn(shape, dtype=torch.float64)
    state, b = update.rule.init(ours, values), torch.zeros(shape, dtype=torch.float64)
    for step in range(10):
        g = torch.randn(shape, dtype=torch.float64)
        ours, state = update(ours, g, state, values, Clock(step, 1.0, step))
        d, b = written_out(g, b, nesterov=nesterov, adjust=adjust)
        theirs = theirs - 0.03 * (d + 0.2 * theirs)
        assert (ours - theirs).abs().max() <= 1e-12


def test_joined_tensors_step_as_single_ones() -> None:
    """Law: the rule of a concatenation, with a flag for each tensor, equals that of each tensor."""
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).double()
    rule, params = rules.Muon(lr_ratio=0.5), list(net.parameters())
    own = rule.by_parameter(net, params)
    problem, weights = st.as_problem(net, mse_loss, Update(rule))
    hparams = {"lr": torch.tensor(0.03, dtype=torch.float64)}
    x = torch.randn(8, 5, dtype=torch.float64)
    point = problem.start(weights, hparams, (x, x.cos()))
    for _ in range(3):
        point = problem.step(point, hparams, point.batch)
    singles = [p.detach() for p in params]
    states = [rule.init(p, values_of(**o.options)) for p, o in zip(singles, own, strict=True)]
    for step in range(3):
        for p, value in zip(params, singles, strict=True):
            p.data = value
        grads = torch.autograd.grad(mse_loss(net(x), x.cos()), params)
        for i, (g, o) in enumerate(zip(grads, own, strict=True)):
            values = values_of(lr=0.03, **o.options)
            clock = Clock(step, o.rate, step)
            singles[i], states[i] = Update(rule)(singles[i], g, states[i], values, clock)
    assert torch.allclose(point.params, torch.cat([s.ravel() for s in singles]), atol=1e-12)


def test_hypergradients_equal_finite_differences() -> None:
    """Of lr, α, weight decay and AdamW's β₁, through whole steps with curvature."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    problem, weights = st.as_problem(net.double(), mse_loss, Update(rules.Muon()))
    hparams = {"lr": 0.02, "decay": 0.1, "weight_decay": 0.1, "beta1": 0.8}
    held = {n: torch.tensor(v, dtype=torch.float64) for n, v in hparams.items()}
    x = torch.randn(5, 8, 4, dtype=torch.float64)
    batches = [(b, b[:, :2].sin()) for b in x]
    args = (weights, held, batches[:4], batches[4])
    truth = hypergradient(problem, FiniteDifference(1e-6), *args).grads
    for estimator in (st.Forward(), st.Unrolled()):
        found = hypergradient(problem, estimator, *args).grads
        for name, t in truth.items():
            assert float(found[name]) == pytest.approx(float(t), rel=1e-5, abs=1e-9), name


def test_without_curvature_rows_equal_finite_differences() -> None:
    """Of lr, α, weight decay and AdamW's β₁: exact for a loss that is linear in the weights."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).double()
    weights = st.as_problem(net, mse_loss, Update(rules.Muon()))[1]
    base = st.as_problem(net, mse_loss, Update(rules.Muon(lr_ratio=0.5)))[0]
    problem = replace(
        base, inner_loss=lambda w, h, b: w @ b, outer_loss=lambda w, b: w @ b, split=None
    )
    hparams = {"lr": 0.02, "decay": 0.1, "weight_decay": 0.1, "beta1": 0.8}
    held = {n: torch.tensor(v, dtype=torch.float64) for n, v in hparams.items()}
    batches = list(torch.randn(7, len(weights), dtype=torch.float64))
    args = (weights, held, batches[:6], batches[6])
    truth = hypergradient(problem, FiniteDifference(1e-6), *args).grads
    found = hypergradient(problem, st.Trace(discount=1.0), *args).grads
    for name in hparams:
        assert float(found[name]) == pytest.approx(float(truth[name]), rel=1e-6), name


class Attention(nn.Module):
    """Embeddings, a position table, an encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 16)
        self.places = nn.Parameter(torch.zeros(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 11)


def named(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {n for n, p in model.named_parameters() if id(p) in ids}


def test_the_usual_split() -> None:
    """Truth: by hand. Every parameter is in exactly one group."""
    model = Attention()
    hidden, rest = st.muon_groups(model)
    inside = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
              "linear2.weight"]  # fmt: skip
    assert named(model, hidden) == {f"blocks.layers.{i}.{n}" for i in (0, 1) for n in inside}
    assert len(hidden["params"]) + len(rest["params"]) == len(list(model.parameters()))
    model.head.weight = model.words.weight  # tied: the last layer is the embedding
    assert named(model, st.muon_groups(model)[0]) == named(model, hidden)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert named(net, st.muon_groups(net)[0]) == {"1.weight"}
    assert named(net, st.muon_groups(net, ())[0]) == {"0.weight", "1.weight", "3.weight"}
    assert named(net, st.muon_groups(net, ["0", "3.weight"])[0]) == {"1.weight"}
    net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    assert named(net, st.muon_groups(net)[0]) == {"1.weight"}


def test_what_cannot_be_split_is_refused() -> None:
    """Law: a ValueError with the remedy."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no hidden matrix for Muon.*others=\(\)\) to"):
        st.muon_groups(net)
    with pytest.raises(ValueError, match=r"others='body' is not the name.*'0\.weight'"):
        st.muon_groups(net, ["body"])
    with pytest.raises(TypeError, match="others='0' must be a list of names"):
        st.muon_groups(net, "0")
    with pytest.raises(ValueError, match=r"beta=0.9 is unknown: use some of \['lr'"):
        rules.Muon(beta=0.9)
    with pytest.raises(ValueError, match="rules contains Muon, which needs whole matrices"):
        rules.Mixture([rules.AdamW(), rules.Muon()])


def test_groups_fit_torchs_own_optimizers() -> None:
    """Law: torch's optimizers take the groups as they are."""
    hidden, rest = st.muon_groups(Attention())
    torch.optim.AdamW([hidden, rest])
    if hasattr(torch.optim, "Muon"):
        torch.optim.Muon(hidden["params"])


def test_tuner_takes_muons_steps() -> None:
    """Truth: the equations for the matrices, torch's AdamW at a third of the rate for the rest."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    twin = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(10, 16, 4, dtype=torch.float64)
    batches = [(b, b[:, :3].argmax(1)) for b in x]
    tuner = st.Tuner(
        net, cross_entropy, rule=rules.Muon(lr_ratio=1 / 3), tune=(), probe=False, guard=False,
        schedule="constant", hparams={"lr": 0.03, "beta2": 0.999},
    )  # fmt: skip
    tuner.fit(batches, batches[:2], steps=10, progress=False)
    hidden, rest = st.muon_groups(twin)
    adamw = torch.optim.AdamW(rest["params"], lr=0.01, weight_decay=0.1)
    (matrix,) = hidden["params"]
    b = torch.zeros_like(matrix)
    for inputs, target in batches:
        twin.zero_grad()
        cross_entropy(twin(inputs), target).backward()
        d, b = written_out(matrix.grad, b, nesterov=True, adjust="match_rms_adamw")
        adamw.step()
        matrix.data -= 0.03 * (d + 0.1 * matrix.data)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_result_as_a_plain_optimizer() -> None:
    """Truth: torch's AdamW for the rest; vectors are refused where Muon would take them."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    result = st.Tuner(net, mse_loss, rule=rules.Muon()).fit(
        [(x, x.cos())] * 4, [(x, x.cos())], steps=4, progress=False
    )
    mse_loss(net(x), x.cos()).backward()
    hidden, rest = st.muon_groups(net)
    values = result.hparams
    twin = torch.optim.AdamW(
        [p.detach().clone().requires_grad_() for p in rest["params"]], values["lr"],
        (values["beta1"], values["beta2"]), weight_decay=values["weight_decay"],
    )  # fmt: skip
    for copied, p in zip(twin.param_groups[0]["params"], rest["params"], strict=True):
        copied.grad = p.grad.clone()
    twin.step()
    result.rule.make([hidden, rest]).step()
    for copied, p in zip(twin.param_groups[0]["params"], rest["params"], strict=True):
        assert torch.allclose(copied, p, atol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(4,\).*st.muon_groups"):
        result.rule.make(net.parameters()).step()


def test_the_plain_optimizer_of_a_run_has_both_rates() -> None:
    """Truth: the groups of ``st.Muon`` at the same rates."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    rule = st.rules.Muon(lr_ratio=0.3)
    plain = st.rules.PlainOptimizer.of(rule, {"lr": 0.01}).make(st.muon_groups(net))
    ours = st.Muon(net, lr=0.01, lr_ratio=0.3)
    for group, expected in zip(plain.param_groups, ours.param_groups, strict=True):
        assert group["use_muon"] == expected["use_muon"]
        assert group["lr"] == pytest.approx(expected["lr"])
