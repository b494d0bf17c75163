"""How torch, higher and TorchOpt take the outer gradient of learners with an inner loop, besides plain MAML.

A learner is written once, as functions of θ (the module's parameters by name) and φ; it runs in a loop over
the tasks with `autograd.grad`, and under `torch.vmap` with `torch.func.grad`. A way is as in ways.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import data
from common import Work, require, torch
from ways import Way, cut, looped

functional_call = torch.func.functional_call
nn = torch.nn


class Adaptation(NamedTuple):
    """A learner whose inner loop takes gradient steps.

    Args:
        start: `start(meta) -> φ`, a dictionary of tensors.
        logits: `logits(meta, φ, features, step)` after `step` inner steps.
        update: `update(meta, φ, gradients, step) -> φ`.
        features: `features(meta, x)`, what no inner step changes: it is computed once.
        first_order: whether inner gradients count as constants.
        every_step: whether the query loss after every step counts, or that after the last alone.
    """

    start: Callable
    logits: Callable
    update: Callable
    features: Callable = lambda meta, x: x
    first_order: bool = False
    every_step: bool = False


def under(meta: dict, prefix: str) -> dict:
    """The entries whose names begin so, without that beginning."""
    return {k[len(prefix) :]: v for k, v in meta.items() if k.startswith(prefix)}


def _plain(rate: float) -> Callable:
    return lambda meta, phi, grads, step: {k: p - rate * grads[k] for k, p in phi.items()}


def _maml(module, work: Work, first_order: bool) -> Adaptation:
    def logits(meta, phi, x, step):
        return functional_call(module, phi, (x,))

    return Adaptation(lambda meta: meta, logits, _plain(work.inner_lr), first_order=first_order)


def _anil(module, work: Work) -> Adaptation:
    return Adaptation(
        lambda meta: under(meta, "head."),
        lambda meta, phi, features, step: functional_call(module.head, phi, (features,)),
        _plain(work.inner_lr),
        lambda meta, x: functional_call(module.body, under(meta, "body."), (x,)),
    )


def _boil(module, work: Work) -> Adaptation:
    def logits(meta, phi, x, step):
        return functional_call(module.head, under(meta, "head."), (functional_call(module.body, phi, (x,)),))

    return Adaptation(lambda meta: under(meta, "body."), logits, _plain(work.inner_lr))


class WithRates(nn.Module):
    """A network and a rate for each of its numbers."""

    def __init__(self, net, rate: float):
        super().__init__()
        self.net = net
        self.rates = nn.ParameterList(torch.full_like(p, rate) for p in net.parameters())


def _meta_sgd(module: WithRates, work: Work) -> Adaptation:
    def update(meta, phi, grads, step):
        rates = under(meta, "rates.").values()
        return {k: p - rate * grads[k] for (k, p), rate in zip(phi.items(), rates, strict=True)}

    return Adaptation(
        lambda meta: under(meta, "net."),
        lambda meta, phi, x, step: functional_call(module.net, phi, (x,)),
        update,
    )


class PlusPlus(nn.Module):
    """MAML++: rates of a tensor and step, scales and shifts of a batch norm and step."""

    def __init__(self, net, rate: float, inner_steps: int):
        super().__init__()
        self.net = net
        norms = [name for name, p in net.named_parameters() if p.ndim == 1 and name.startswith("body.")]
        self.norm_names = norms
        self.names = [name for name, _ in net.named_parameters() if name not in norms]
        rows = dict(net.named_parameters())
        self.norms = nn.ParameterList(
            torch.stack([rows[name].detach()] * (inner_steps + 1)) for name in norms
        )
        self.rates = nn.ParameterList(torch.full((inner_steps,), rate) for _ in self.names)
        for name in norms:  # those of each step are learned in their place
            rows[name].requires_grad_(False)


def _maml_plus_plus(module: PlusPlus, work: Work) -> Adaptation:
    def start(meta):
        net = under(meta, "net.")
        return {name: net[name] for name in module.names}

    def logits(meta, phi, x, step):
        rows = zip(module.norm_names, under(meta, "norms.").values(), strict=True)
        return functional_call(module.net, {**phi, **{name: row[step] for name, row in rows}}, (x,))

    def update(meta, phi, grads, step):
        rates = under(meta, "rates.").values()
        return {k: p - rate[step] * grads[k] for (k, p), rate in zip(phi.items(), rates, strict=True)}

    return Adaptation(start, logits, update, every_step=True)


class Film(nn.Module):
    """CAVIA: a network whose third block a context scales and shifts behind its batch norm."""

    def __init__(self, net, filters: int):
        super().__init__()
        self.front, self.back, self.head = net.body[:8], net.body[8:], net.head
        self.u, self.v = (nn.Parameter(torch.from_numpy(w)) for w in data.film_weights(filters))


def _cavia(module: Film, work: Work) -> Adaptation:
    zeros = torch.zeros(data.CONTEXT, requires_grad=True)

    def logits(meta, phi, h, step):
        factor, shift = 1 + meta["u"] @ phi["context"], meta["v"] @ phi["context"]
        h = h * factor[:, None, None] + shift[:, None, None]
        h = functional_call(module.back, under(meta, "back."), (h,))
        return functional_call(module.head, under(meta, "head."), (h,))

    return Adaptation(
        lambda meta: {"context": zeros},
        logits,
        _plain(work.inner_lr),
        lambda meta, x: functional_call(module.front, under(meta, "front."), (x,)),
    )


ADAPTATIONS = {
    "MAML": partial(_maml, first_order=False),
    "FOMAML": partial(_maml, first_order=True),
    "ANIL": _anil,
    "BOIL": _boil,
    "Meta-SGD": _meta_sgd,
    "MAML++": _maml_plus_plus,
    "CAVIA": _cavia,
}


def _by_autograd(loss: Callable, phi: dict, first_order: bool) -> dict:
    grads = torch.autograd.grad(loss(phi), tuple(phi.values()), create_graph=not first_order)
    return dict(zip(phi, grads, strict=True))


def _by_func(loss: Callable, phi: dict, first_order: bool) -> dict:
    if first_order:
        phi = {k: p.detach() for k, p in phi.items()}
    return torch.func.grad(loss)(phi)


def _task_loss(adaptation: Adaptation, work: Work, gradient: Callable) -> Callable:
    """The outer loss of one task as a function of θ and the task."""

    def query_loss(meta, x, y, query_x, query_y):
        x, query_x = adaptation.features(meta, x), adaptation.features(meta, query_x)
        phi, losses = adaptation.start(meta), []
        for step in range(work.inner_steps):

            def support_loss(phi, step=step):
                return work.loss(adaptation.logits(meta, phi, x, step), y)

            grads = gradient(support_loss, phi, adaptation.first_order)
            phi = adaptation.update(meta, phi, grads, step)
            if adaptation.every_step or step + 1 == work.inner_steps:
                losses.append(work.loss(adaptation.logits(meta, phi, query_x, step + 1), query_y))
        return sum(losses) / len(losses)

    return query_loss


def _loop(module, work: Work, support, query, make: Callable, at_once: bool):
    meta = dict(module.named_parameters())
    query_loss = _task_loss(make(module, work), work, _by_autograd)
    return looped(partial(query_loss, meta), cut(support, query), at_once)


def _vmap(module, work: Work, support, query, make: Callable, chunk: int | None):
    meta = dict(module.named_parameters())
    query_loss = _task_loss(make(module, work), work, _by_func)
    losses = torch.vmap(query_loss, in_dims=(None, 0, 0, 0, 0), chunk_size=chunk)

    def gradient():
        loss = losses(meta, *support, *query).mean()
        loss.backward()
        return loss.detach()

    return gradient


class Part(NamedTuple):
    """Which module the inner loop adapts, what stands before it and what makes logits of its output."""

    module: Callable
    before: Callable = lambda net, x: x
    after: Callable = lambda net, x: x


PARTS = {
    "MAML": Part(lambda net: net),
    "FOMAML": Part(lambda net: net),
    "ANIL": Part(lambda net: net.head, before=lambda net, x: net.body(x)),
    "BOIL": Part(lambda net: net.body, after=lambda net, x: net.head(x)),
    "Meta-SGD": Part(lambda module: module.net),
}


def _higher(net, work: Work, support, query, name: str, at_once: bool):
    higher, part = require("higher"), PARTS[name]
    module = part.module(net)
    # A group for each tensor, so that a rate can be given for each.
    groups = [{"params": [p]} for p in module.parameters()]
    inner = torch.optim.SGD(groups, lr=work.inner_lr)
    override = {"lr": list(net.rates)} if name == "Meta-SGD" else None

    def each_task(x, y, query_x, query_y):
        with higher.innerloop_ctx(module, inner, copy_initial_weights=False, override=override) as (
            adapted,
            optimizer,
        ):
            x = part.before(net, x)
            for _ in range(work.inner_steps):
                optimizer.step(work.loss(part.after(net, adapted(x)), y))
            return work.loss(part.after(net, adapted(part.before(net, query_x))), query_y)

    return looped(each_task, cut(support, query), at_once)


def _higher_first_order(net, work: Work, support, query):
    higher, tasks = require("higher"), cut(support, query)
    inner = torch.optim.SGD(net.parameters(), lr=work.inner_lr)

    def gradient():
        total = torch.zeros(())
        for x, y, query_x, query_y in tasks:
            with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (adapted, optimizer):
                for _ in range(work.inner_steps):
                    optimizer.step(work.loss(adapted(x), y))
                loss = work.loss(adapted(query_x), query_y) / len(tasks)
                grads = torch.autograd.grad(loss, adapted.parameters())
            for p, g in zip(net.parameters(), grads, strict=True):
                p.grad = g if p.grad is None else p.grad.add_(g)
            total += loss.detach()
        return total

    return gradient


def _torchopt(net, work: Work, support, query, name: str, at_once: bool):
    torchopt, part = require("torchopt"), PARTS[name]
    module = part.module(net)
    inner = torchopt.MetaSGD(module, lr=work.inner_lr)
    start = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
    optimizer_start = torchopt.extract_state_dict(inner, by="reference")

    def each_task(x, y, query_x, query_y):
        x = part.before(net, x)
        for _ in range(work.inner_steps):
            inner.step(work.loss(part.after(net, module(x)), y))
        loss = work.loss(part.after(net, module(part.before(net, query_x))), query_y)
        torchopt.recover_state_dict(module, start)
        torchopt.recover_state_dict(inner, optimizer_start)
        return loss

    return looped(each_task, cut(support, query), at_once)


def _reptile(net, work: Work, support, query, fused: bool):
    """Plain training on a task from a copy of θ; θ − φ is left in `.grad`."""
    theta, tasks = list(net.parameters()), cut(support, query)
    start = [p.detach().clone() for p in theta]  # holds θ while the network's own tensors are φ
    kind = {"fused": True} if fused else {"foreach": True}

    def gradient():
        torch._foreach_copy_(start, [p.detach() for p in theta])
        total, moved = torch.zeros(()), [torch.zeros_like(p) for p in start]
        for x, y, query_x, query_y in tasks:
            optimizer = torch.optim.Adam(
                theta, lr=work.inner_lr, betas=(0.0, 0.999), eps=data.EPSILON, **kind
            )
            for _ in range(work.inner_steps):
                optimizer.zero_grad()
                work.loss(net(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                total += work.loss(net(query_x), query_y)
                torch._foreach_add_(moved, theta)
                torch._foreach_copy_(theta, start)
        for p, begin, m in zip(theta, start, moved, strict=True):
            p.grad = begin - m / len(tasks)
        return total / len(tasks)

    return gradient


def _both(way: Callable, name: str) -> dict[str, Way]:
    return {
        f"{name}, a backward pass a task": Way(partial(way, at_once=False), vmapped=False),
        f"{name}, one backward pass": Way(partial(way, at_once=True), vmapped=False),
    }


def inner_loop_ways(name: str) -> dict[str, Way]:
    """Every way of every library for one of these learners."""
    if name == "Reptile":
        return {
            "torch: loop, fused Adam": Way(partial(_reptile, fused=True), vmapped=False),
            "torch: loop, foreach Adam": Way(partial(_reptile, fused=False), vmapped=False),
        }
    make = ADAPTATIONS[name]
    ways = _both(partial(_loop, make=make), "torch: loop")
    for chunk in (None, 4):
        title = f"torch.func: vmap{f' by chunks of {chunk}' if chunk else ''}"
        ways[title] = Way(partial(_vmap, make=make, chunk=chunk), vmapped=True)
    if name == "FOMAML":
        ways["higher: track_higher_grads=False"] = Way(_higher_first_order, vmapped=False)
    elif name in PARTS:
        ways |= _both(partial(_higher, name=name), "higher: innerloop_ctx")
    if name in ("MAML", "ANIL", "BOIL"):
        ways |= _both(partial(_torchopt, name=name), "TorchOpt: MetaSGD")
    return ways
