"""The extended workloads. Truths: descent on one batch, seeds, torch's autograd, closed forms."""

import os
from functools import cache, partial

import pytest
import torch
from torch.nn import functional as F

import selftune as st
from benchmarks.workloads import EXTENDED, FURTHER, LATEST, SUITE, Workload, adaptation, named
from benchmarks.workloads.graphs import NEIGHBOURS
from benchmarks.workloads.pairs import contrastive
from benchmarks.workloads.physics import VISCOSITY

WITHOUT_FILES = {
    *("code-transformer", "denoiser", "digit-graph", "sine-image", "burgers"),
    *("mixture-density", "factors", "teacher", "adding"),
    *("pendulum", "poisson", "flow", "ill-conditioned", "modular-addition"),
}
UNSEEN = [*EXTENDED, *FURTHER, *LATEST]


pretrained = partial(adaptation.pretrained, 20)


@pytest.fixture(autouse=True)
def pretrained_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 20 steps instead of 200: adapters are the same on any weights."""
    monkeypatch.setattr(adaptation, "pretrained", pretrained)


@cache
def workload(name: str) -> Workload:
    if name not in WITHOUT_FILES and "SELFTUNE_DATA" not in os.environ:
        pytest.skip(f"{name} needs SELFTUNE_DATA, the folder of data files")
    try:
        return named(name)
    except FileNotFoundError as error:
        pytest.skip(f"{name} needs {error.filename}")


def descend(job: Workload, seed: int, steps: int) -> list[float]:
    """Losses of one batch under torch's Adam."""
    model = job.model(seed)
    batch = tuple(part[:16] for part in next(job.batches("train", seed)))
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = job.loss(model, batch)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", UNSEEN)
def test_the_loss_falls_and_is_a_function_of_the_seed(name: str) -> None:
    job = workload(name)
    losses = descend(job, 0, 5)
    assert losses[-1] < losses[0]
    assert descend(job, 0, 2) == losses[:2]
    assert descend(job, 1, 1) != losses[:1]


@pytest.mark.parametrize("name", UNSEEN)
def test_parts_have_one_form_and_finite_numbers(name: str) -> None:
    job = workload(name)
    assert job.name == name
    assert set(job.splits) == {"train", "val", "test"}
    for part in (0, 1):
        tensors = [job.splits[s][part] for s in ("train", "val", "test")]
        assert len({t.shape[1:] for t in tensors}) == len({t.dtype for t in tensors}) == 1
        assert all(t.float().isfinite().all() for t in tensors)
    assert all(len(x) == len(y) for x, y in job.splits.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSEEN)
def test_every_workload_trains_with_tuned_hyperparameters(name: str) -> None:
    """A hypergradient passes through every model: lr moves off its start, and all is finite."""
    job = workload(name)
    model = job.model(0)
    train, val = job.batches("train", 0), job.batches("val", 1)
    opt = st.AdamW(model, lr=1e-3, total_steps=40, probe=False)
    for _ in range(20):
        opt.zero_grad()
        job.loss(model, next(train)).backward()
        opt.step()
        opt.hyper_step(lambda: job.loss(model, next(val)))
    assert opt.hparams["lr"] != 1e-3
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_suite_of_the_proof_is_as_it_was() -> None:
    assert not SUITE.keys() & EXTENDED.keys()
    assert list(SUITE) == [
        *("digits", "few-digits", "fashion-cnn", "fashion-vit", "noisy-fashion", "autoencoder"),
        *("shakespeare-transformer", "shakespeare-lstm", "wikitext-lstm"),
        *("energy", "concrete", "yacht", "power", "wine_red"),
    ]


def test_names_make_jobs_longer() -> None:
    assert named("digits×25").steps == 25 * named("digits").steps
    for wrong in ("nothing", "digits×", "digits×0", "digits×two"):
        with pytest.raises(ValueError, match=f"workload {wrong} is unknown: use one of digits"):
            named(wrong)


def test_the_residual_of_burgers_equation_is_autograds() -> None:
    model = workload("burgers").model(0).double()
    points = torch.rand(20, 2, dtype=torch.float64, requires_grad=True)
    zeros, ones = torch.zeros(20, 1, dtype=torch.float64), torch.ones(20, 1, dtype=torch.float64)
    u = model(torch.cat([points, zeros], 1))
    du = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    u_xx = torch.autograd.grad(du[:, 0].sum(), points)[0][:, :1]
    expected = du[:, 1:] + u * du[:, :1] - VISCOSITY * u_xx
    torch.testing.assert_close(model(torch.cat([points, ones], 1)), expected)


def test_the_contrastive_loss_is_the_papers() -> None:
    """Equal at 0.5, unequal at 0.25 and at 2: (0.25 + 0.5625 + 0) / 3."""
    loss = contrastive(torch.tensor([0.5, 0.25, 2.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert loss.item() == pytest.approx((0.25 + 0.5625) / 3)


def test_pairs_are_of_other_kinds_in_every_part() -> None:
    """No image of one part lies in another."""
    seen = [
        {row.numpy().tobytes() for row in x.flatten(0, 1).flatten(1)}
        for x, _ in workload("siamese").splits.values()
    ]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


def test_messages_are_products_with_the_adjacency_matrix() -> None:
    model = workload("digit-graph").model(0)
    count = len(model.features)
    adjacency = torch.zeros(count, count).scatter_(1, model.neighbours, 1 / NEIGHBOURS)
    assert adjacency.diagonal().sum() == 0
    h = model.features
    for own, others in zip(model.own, model.others, strict=True):
        h = F.relu(own(h) + adjacency @ others(h))
    nodes = torch.tensor([0, 7, 1796])
    torch.testing.assert_close(model(nodes), model.head(h)[nodes], rtol=1e-4, atol=1e-5)


def test_adapters_begin_as_the_pretrained_model_and_leave_it_alone() -> None:
    job = workload("low-rank")
    batch = job.splits["train"][0][:8]
    kept = {k: v.clone() for k, v in pretrained().state_dict().items()}
    model = job.model(0)
    torch.testing.assert_close(model(batch), pretrained()(batch))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5120
    descend(job, 0, 2)
    assert all(torch.equal(v, kept[k]) for k, v in pretrained().state_dict().items())


def test_point_sets_have_no_order() -> None:
    job = workload("point-sets")
    model, x = job.model(0), job.splits["val"][0][:8]
    torch.testing.assert_close(model(x), model(x.flip(1)), rtol=1e-4, atol=1e-5)


def test_the_lists_have_no_name_in_common() -> None:
    assert len({*SUITE, *UNSEEN}) == len(SUITE) + len(EXTENDED) + len(FURTHER) + len(LATEST)


@torch.no_grad()
def test_a_flow_is_a_density() -> None:
    """It integrates to 1 over the plane; 1e-5 lies outside the square."""
    side = torch.linspace(-40, 40, 401, dtype=torch.float64)
    surprise = workload("flow").model(0).double()(torch.cartesian_prod(side, side))
    assert (-surprise).exp().sum().item() * 0.2**2 == pytest.approx(1, abs=1e-4)


def test_two_experts_have_all_the_weight() -> None:
    """With equal experts the mixture is any one of them."""
    job = workload("mixture-of-experts")
    model, x = job.model(0), job.splits["val"][0][:8]
    with torch.no_grad():
        for part in (model.first, model.last):
            part.copy_(part[:1].expand_as(part))
    expected = torch.relu(x @ model.first[0]) @ model.last[0]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_gradients_pass_straight_through_the_codebook() -> None:
    """The decoder sees entries of the codebook; the code's gradient is that of the entry."""
    model = workload("vector-quantized").model(0)
    seen: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    code = torch.randn(4, 64, requires_grad=True)
    model.encoder = torch.nn.Identity()
    pixels = model(code)[:, :-1].sum()
    entries = seen[0].detach().unflatten(1, (8, 8)).flatten(0, 1)
    assert torch.cdist(entries, model.codebook).min(1).values.max() < 1e-3
    own, entry = torch.autograd.grad(pixels, [code, seen[0]])
    torch.testing.assert_close(own, entry)
