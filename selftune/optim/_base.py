"""The optimizer shell: torch's interface outside, the pure step inside."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from selftune.averaging import Average
from selftune.estimators import AbstractEstimator, Trace
from selftune.guard import Guard
from selftune.hparams import Tuned
from selftune.hyperstep import HyperOptimizer, HyperStep, adam
from selftune.optim._block import Block
from selftune.probe import Probe
from selftune.schedules import Schedule
from selftune.update import Update

log = logging.getLogger("selftune")


class SelfTuned(torch.optim.Optimizer):
    cap = 20.0
    slow = {}
    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        update: Update,
        *,
        tune: tuple[str, ...] | None = None,
        per: str | Mapping[str, str] = "run",
        bounds: Mapping[str, tuple[float, float]] | None = None,
        schedule: str | None = None,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        estimator: AbstractEstimator | None = None,
        average: Average | None = None,
        hyper_optimizer: HyperOptimizer = adam,
        every: int = 5,
        probe: bool | int = True,
        guard: bool = True,
    ):
        super().__init__(params, defaults)
        self.update = update
        self.schedule = Schedule(shape=schedule, total_steps=total_steps, warmup_steps=warmup_steps)
        self.estimator = estimator or Trace()
        self.averaging = average or Average()
        known = update.hparams
        names = update.rule.tuned if tune is None else tune
        names = [n for n in known if n in names]
        self.tuned = {n: Tuned(known[n], "run") for n in names}
        import dataclasses
        T = total_steps or 1000
        for n in ("momentum", "beta1"):
            if n in self.tuned:
                self.tuned[n].hparam = dataclasses.replace(self.tuned[n].hparam, upper=max(0.9, 1 - self.cap / T))
        self.every = every
        self.make = hyper_optimizer
        self.steps = 0
        self.outer = 0
        n = probe if not isinstance(probe, bool) else max(8, min(100, (total_steps or 500) // 20))
        self.probe = Probe(steps=n) if probe and "lr" in self.tuned else None
        self.guard = Guard() if guard else None
        self.blocks = None
        self.last = None
        self.events = []
        self.floor = 0.01
        self.gap = 0.0
        self.couple = True
        self.heat = 0.0

    def _build(self):
        values = [
            [t.hparam.read(g) for _ in g["params"]] for t in self.tuned.values() for g in self.param_groups
        ]
        groups = [i for i, g in enumerate(self.param_groups) for _ in g["params"]]
        for t in self.tuned.values():
            t.lay_out([t.hparam.read(g) for g in self.param_groups for _ in g["params"]], groups)
        self.hyper = HyperStep(sum(len(t.shift) for t in self.tuned.values()), self.make)
        for i, n in enumerate(self.tuned): self.hyper.pace[i] = self.slow.get(n, 1.0)
        with torch.no_grad():
            self.hyper.raw.copy_(torch.cat([t.shift for t in self.tuned.values()]) if self.tuned else self.hyper.raw)
        self.blocks = [
            Block(g["params"], [self.state[p] for p in g["params"]], self.update, self.estimator, self._options(g), list(self.tuned))
            for g in self.param_groups
        ]
        self._refresh()

    def _options(self, g):
        v = {k: x for k, x in g.items() if k != "params"}
        for n, h in self.update.hparams.items():
            v[n] = h.read(g)
        return v

    def _refresh(self):
        self._values, self._slopes = [], []
        start = 0
        for b, g in zip(self.blocks, self.param_groups):
            v = self._options(g)
            s = {}
            n = len(b.params)
            for name, t in self.tuned.items():
                v[name] = b.layout.expand(t.values()[start:start + n].tolist())
                s[name] = b.layout.expand(t.slopes()[start:start + n].tolist())
            start += n
            self._values.append(v)
            self._slopes.append(s)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.blocks is None:
            self._build()
        grads = [b.gradient() for b in self.blocks]
        sq = sum(float(g @ g) for g, _ in grads)
        if self.probe and not self.probe.ended:
            self._probe_step(grads, sq)
            self.steps += 1
            return loss
        if self.guard:
            v = self.guard.gradient(sq)
            if v == "ok" and self.steps % 10 == 0:
                v = self.guard.pulse(sum(int(torch.count_nonzero(g)) for g, _ in grads) / sum(g.numel() for g, _ in grads))
            if v != "ok":
                if v == "rollback":
                    self._rollback("gradient")
                self.steps += 1
                return loss
        rate = self.schedule(self.steps)
        share = self.averaging.weight(self.steps - self.outer_start if hasattr(self, "outer_start") else self.steps)
        for b, (g, m), v, s in zip(self.blocks, grads, self._values, self._slopes):
            b._w0 = b.weights()
            moved = b.advance(g, m, v, s, self.steps, rate)
            if self.gap:
                w = b._w0
                if self.update.rule.decoupled:
                    bc = 1 - v["beta2"] ** max(1, b.ages[0])
                    P = (b.state["exp_avg_sq"] / bc).sqrt()
                    r = g + v["weight_decay"] * w * P
                else:
                    r = self.update.penalised(w, g, v)
                if getattr(b, "r", None) is None: b.r = r.clone()
                b.r.lerp_(r, share)
            b.blend(moved, share)
            b.layout.write(moved, b.params)
        self.steps += 1
        return loss

    def _probe_step(self, grads, sq):
        p = self.probe
        if p.taken:
            slope = sum(float(g @ (b.weights() - b.average)) for b, (g, _) in zip(self.blocks, grads))
            if p.observe(slope) and getattr(self, "keep_best", True):
                for b in self.blocks:
                    b.good.copy_(b.weights())
        if p.ended:
            return self._end_probe()
        for b, (g, m), v in zip(self.blocks, grads, self._values):
            b.average.copy_(b.weights())
            rows, b.rows = b.rows, []
            moved = b.advance(g, m, v, {}, 0, p.factor)
            b.rows = rows
            b.layout.write(moved, b.params)
        p.taken += 1

    def _end_probe(self):
        for b in self.blocks:
            b.layout.write(b.good, b.params)
            b.average.copy_(b.good)
            b.forget()
        self.outer_start = self.steps
        c = self.probe.choice
        self.events.append((self.steps, "probe", c, self.probe.best))
        with torch.no_grad():
            self.hyper.raw[0] += math.log(c)
        self._pull()

    def _pull(self):
        start = 0
        for t in self.tuned.values():
            n = len(t.shift)
            t.shift = self.hyper.raw.detach()[start:start + n].clone()
            t.clamp()
            start += n
        with torch.no_grad():
            self.hyper.raw.copy_(torch.cat([t.shift for t in self.tuned.values()]))
        self._refresh()

    def _rollback(self, why):
        cool = self.guard.rolled_back(why)
        self.events.append((self.steps, "rollback", why, cool))
        for b in self.blocks:
            b.layout.write(b.good, b.params)
            b.average.copy_(b.good)
            b.forget()
        self.hyper.reset()
        with torch.no_grad():
            i = 0
            for n, t in self.tuned.items():
                if n == "lr":
                    self.hyper.raw[i] -= cool
                if n in ("momentum", "beta1") and not why.startswith("loss"):
                    self.hyper.raw[i] -= 0.7
                if n == "weight_decay" and why.startswith("loss"):
                    self.hyper.raw[i] += self.heat
                i += len(t.shift)
        self.outer_start = self.steps
        self._pull()

    def hyper_step(self, closure):
        if self.blocks is None or (self.probe and not self.probe.ended) or self.steps - self.outer < self.every:
            return None
        self.outer = self.steps
        keep = [b.weights() for b in self.blocks]
        if hasattr(self, "outer_start") and self.steps - self.outer_start < 2: return None
        for b in self.blocks:
            b.layout.write(b.average, b.params)
        with torch.enable_grad():
            loss = closure()
            params = [p for b in self.blocks for p in b.params]
            grads = torch.autograd.grad(loss, params)
        self.last = float(loss.detach())
        for b, k in zip(self.blocks, keep):
            b.layout.write(k, b.params)
        if self.guard:
            v = self.guard.loss(self.last)
            if v == "best":
                for b in self.blocks: b.good.copy_(b.average)
            if v == "rollback":
                self._rollback("loss %.3g" % self.last)
                return loss.detach()
        if not self.tuned: return loss.detach()
        i = 0
        sig = 0
        with torch.no_grad():
            for b in self.blocks:
                g = b.layout.flatten(grads[i:i + len(b.params)])
                i += len(b.params)
                one = b.signal(g, False)
                if self.gap and "weight_decay" in self.tuned:
                    k = list(self.tuned).index("weight_decay")
                    one[k] -= self.gap * (b.response[k] @ b.r)
                sig = sig + one
            names = list(self.tuned)
            mu = "momentum" if "momentum" in names else None
            couple = self.couple and mu and "lr" in names
            if couple:
                m0 = self.hparams[mu]
                sig[names.index(mu)] -= m0 * sig[names.index("lr")]
            if self.floor and "weight_decay" in names:
                import dataclasses
                h = self.hparams
                lr = h.get("lr", self.param_groups[0]["lr"])
                mo = h.get("momentum", self.param_groups[0].get("momentum", 0)) or 0
                T = self.schedule.total_steps or 1000
                t = self.tuned["weight_decay"]
                t.hparam = dataclasses.replace(t.hparam, lower=min(1.0, self.floor * (1 - mo) / (lr * T / 2)))
            low = torch.cat([t.bounds()[0] for t in self.tuned.values()])
            high = torch.cat([t.bounds()[1] for t in self.tuned.values()])
            self.hyper.step(sig[:, 0].double(), low, high)
            if couple:
                t = self.tuned[mu]
                raw = t.base + self.hyper.raw.detach()[names.index(mu)]
                m1 = raw.sigmoid()[0].item()
                self.hyper.raw[names.index("lr")] += math.log((1 - m1) / (1 - m0))
            self._pull()
        return loss.detach()

    @contextmanager
    def averaged(self):
        keep = [b.weights() for b in self.blocks]
        for b in self.blocks:
            b.layout.write(b.average, b.params)
        yield
        for b, k in zip(self.blocks, keep):
            b.layout.write(k, b.params)

    @property
    def hparams(self):
        return {n: t.values()[0].item() for n, t in self.tuned.items()}
