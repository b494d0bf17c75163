"""How each peer takes the exact second-order gradient of MAML, as its own documents recommend.

A way is `way(net, work, support, query) -> gradient`, and `gradient()` returns the outer loss and
leaves the gradient of the mean query loss over the tasks in `.grad` of the network's parameters.
A peer may have several ways; the fastest is timed.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from common import Work, require, torch

functional_call = torch.func.functional_call


class Way(NamedTuple):
    """A way of a peer, and whether it runs the network under `vmap`."""

    build: Callable
    vmapped: bool


def cut(support, query):
    """The fixed tasks, cut apart once, outside the timing."""
    return list(zip(*support, *query, strict=True))


def looped(each_task: Callable, tasks: list, at_once: bool) -> Callable:
    """A loop over the tasks, with one backward pass for all tasks or one for each."""

    def gradient():
        if at_once:
            loss = torch.stack([each_task(*task) for task in tasks]).mean()
            loss.backward()
            return loss.detach()
        total = torch.zeros(())
        for task in tasks:
            loss = each_task(*task) / len(tasks)
            loss.backward()
            total += loss.detach()
        return total

    return gradient


def _torch_loop(net, work: Work, support, query, at_once: bool):
    params = dict(net.named_parameters())

    def each_task(x, y, query_x, query_y):
        fast = params
        for _ in range(work.inner_steps):
            loss = work.loss(functional_call(net, fast, (x,)), y)
            grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=True)
            fast = {k: p - work.inner_lr * g for (k, p), g in zip(fast.items(), grads, strict=True)}
        return work.loss(functional_call(net, fast, (query_x,)), query_y)

    return looped(each_task, cut(support, query), at_once)


def _higher(net, work: Work, support, query, at_once: bool):
    higher = require("higher")
    inner = torch.optim.SGD(net.parameters(), lr=work.inner_lr)

    def each_task(x, y, query_x, query_y):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(work.inner_steps):
                diffopt.step(work.loss(fnet(x), y))
            return work.loss(fnet(query_x), query_y)

    return looped(each_task, cut(support, query), at_once)


def _torchopt_meta(net, work: Work, support, query, at_once: bool):
    torchopt = require("torchopt")
    inner = torchopt.MetaSGD(net, lr=work.inner_lr)
    # The first update replaces the tensors inside the network: the leaves are kept here, and are
    # put back after every task.
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    optimizer_start = torchopt.extract_state_dict(inner, by="reference")

    def each_task(x, y, query_x, query_y):
        for _ in range(work.inner_steps):
            inner.step(work.loss(net(x), y))
        loss = work.loss(net(query_x), query_y)
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, optimizer_start)
        return loss

    return looped(each_task, cut(support, query), at_once)


def _task_loss(net, work: Work, update: Callable) -> Callable:
    """The query loss of one task after inner steps by `torch.func.grad`."""

    def support_loss(params, x, y):
        return work.loss(functional_call(net, params, (x,)), y)

    inner_grad = torch.func.grad(support_loss)

    def query_loss(params, x, y, query_x, query_y):
        for _ in range(work.inner_steps):
            params = update(params, inner_grad(params, x, y))
        return support_loss(params, query_x, query_y)

    return query_loss


def _sgd(work: Work) -> Callable:
    return lambda params, grads: {k: p - work.inner_lr * grads[k] for k, p in params.items()}


def _torchopt_sgd(work: Work) -> Callable:
    torchopt = require("torchopt")
    inner = torchopt.sgd(lr=work.inner_lr)

    def update(params, grads):
        # SGD without momentum has no state worth keeping from one step to the next.
        updates, _ = inner.update(grads, inner.init(params), inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False)

    return update


def _vmap_backward(net, work: Work, support, query, make_update: Callable, chunk: int | None):
    """`vmap` over the tasks inside, `backward` outside."""
    params = dict(net.named_parameters())
    losses = torch.vmap(
        _task_loss(net, work, make_update(work)), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk
    )

    def gradient():
        loss = losses(params, *support, *query).mean()
        loss.backward()
        return loss.detach()

    return gradient


def _mean_grad(net, work: Work, chunk: int | None) -> Callable:
    losses = torch.vmap(_task_loss(net, work, _sgd(work)), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk)
    return torch.func.grad_and_value(lambda params, *task: losses(params, *task).mean())


def _func_grad(net, work: Work, support, query, compiled: bool, chunk: int | None):
    """`torch.func.grad` of the mean of a `vmap`, which `torch.compile` can take whole."""
    named = dict(net.named_parameters())
    params = {k: p.detach() for k, p in named.items()}  # shares memory with the parameters
    grad_and_value = _mean_grad(net, work, chunk)
    if compiled:
        torch._dynamo.reset()  # otherwise the tuning would count as recompilations
        grad_and_value = torch.compile(grad_and_value, fullgraph=True)

    def gradient():
        grads, loss = grad_and_value(params, *support, *query)
        for k, p in named.items():
            p.grad = grads[k].detach()
        return loss.detach()

    return gradient


def _loops(way: Callable, name: str) -> dict[str, Way]:
    return {
        f"{name}, a backward pass a task": Way(partial(way, at_once=False), vmapped=False),
        f"{name}, one backward pass": Way(partial(way, at_once=True), vmapped=False),
    }


def _vmaps(name: str, make_update: Callable, chunks: tuple) -> dict[str, Way]:
    return {
        f"{name}{f' by chunks of {chunk}' if chunk else ''}, backward": Way(
            partial(_vmap_backward, make_update=make_update, chunk=chunk), vmapped=True
        )
        for chunk in chunks
    }


def _func_grad_way(compiled: bool) -> Way:
    return Way(partial(_func_grad, compiled=compiled, chunk=None), vmapped=True)


def _torchopt(chunks: tuple) -> dict[str, Way]:
    require("torchopt")
    return _loops(_torchopt_meta, "MetaSGD") | _vmaps("torchopt.sgd + vmap", _torchopt_sgd, chunks)


def _higher_ways() -> dict[str, Way]:
    require("higher")
    return _loops(_higher, "innerloop_ctx")


def _torch_func(chunks: tuple) -> dict[str, Way]:
    return _vmaps("vmap", _sgd, chunks) | {"vmap, torch.func.grad": _func_grad_way(compiled=False)}


def all_ways(chunks: tuple) -> dict[str, Callable]:
    """The ways of each peer by name, made when asked for, so that only that peer is imported.

    Args:
        chunks: sizes of the chunks of tasks that `vmap` may take; None is all tasks at once.
    """
    return {
        "torchopt": partial(_torchopt, chunks),
        "higher": _higher_ways,
        "torch_func": partial(_torch_func, chunks),
        "torch_compile": lambda: {"torch.compile of vmap": _func_grad_way(compiled=True)},
        "torch_loop": lambda: _loops(_torch_loop, "autograd.grad"),
    }
