"""How the peers take learners without derivatives through inner steps: iMAML, and embeddings."""

from collections.abc import Callable
from functools import partial

import data
from common import Work, require, torch
from ways import Way, cut

functional_call = torch.func.functional_call
nn = torch.nn
functional = nn.functional


def _tied_loss(net, work: Work, phi: dict, theta: dict, x, y):
    """The support loss with the pull towards θ."""
    pulls = sum(((phi[k] - theta[k]) ** 2).sum() for k in phi)
    return work.loss(functional_call(net, phi, (x,)), y) + 0.5 * data.IMAML_STRENGTH * pulls


def _inner(product_a: dict, product_b: dict):
    return sum((product_a[k] * product_b[k]).sum() for k in product_a)


def _conjugate_gradients(product: Callable, b: dict, num_steps: int) -> dict:
    """The solution of `product(q) = b`, from zero."""
    q, r, p = {k: torch.zeros_like(v) for k, v in b.items()}, b, b
    rr = _inner(r, r)
    for _ in range(num_steps):
        ap = product(p)
        alpha = rr / _inner(p, ap)
        q = {k: q[k] + alpha * p[k] for k in q}
        r = {k: r[k] - alpha * ap[k] for k in r}
        new = _inner(r, r)
        p = {k: r[k] + new / rr * p[k] for k in r}
        rr = new
    return q


def _imaml_loop(net, work: Work, support, query):
    """The graph of one inner gradient is kept, and each product with the Hessian goes back through it."""
    named, tasks = dict(net.named_parameters()), cut(support, query)

    def adapted(theta, x, y):
        phi = {k: p.detach().requires_grad_() for k, p in theta.items()}
        for _ in range(work.inner_steps):
            # The derivative of the pull is written out.
            loss = work.loss(functional_call(net, phi, (x,)), y)
            grads = torch.autograd.grad(loss, tuple(phi.values()))
            phi = {
                k: (p - work.inner_lr * (g + data.IMAML_STRENGTH * (p - theta[k]))).detach().requires_grad_()
                for (k, p), g in zip(phi.items(), grads, strict=True)
            }
        return phi

    def gradient():
        theta, total = {k: p.detach() for k, p in named.items()}, torch.zeros(())
        for x, y, query_x, query_y in tasks:
            phi = adapted(theta, x, y)
            leaves = tuple(phi.values())
            loss = work.loss(functional_call(net, phi, (query_x,)), query_y) / len(tasks)
            b = dict(zip(phi, torch.autograd.grad(loss, leaves), strict=True))
            slopes = torch.autograd.grad(
                work.loss(functional_call(net, phi, (x,)), y), leaves, create_graph=True
            )

            def product(v, slopes=slopes, leaves=leaves, names=tuple(phi)):
                rows = torch.autograd.grad(slopes, leaves, tuple(v.values()), retain_graph=True)
                return {k: h + data.IMAML_STRENGTH * v[k] for k, h in zip(names, rows, strict=True)}

            q = _conjugate_gradients(product, b, data.IMAML_CG_STEPS)
            for k, p in named.items():
                g = data.IMAML_STRENGTH * q[k]
                p.grad = g if p.grad is None else p.grad.add_(g)
            total += loss.detach()
        return total

    return gradient


def _imaml_vmap(net, work: Work, support, query):
    """All tasks at once; a product with the Hessian is forward over reverse."""
    named = dict(net.named_parameters())

    def one(theta, x, y, query_x, query_y):
        slope = torch.func.grad(lambda phi: _tied_loss(net, work, phi, theta, x, y))
        phi = theta
        for _ in range(work.inner_steps):
            grads = slope(phi)
            phi = {k: p - work.inner_lr * grads[k] for k, p in phi.items()}
        b, loss = torch.func.grad_and_value(
            lambda phi: work.loss(functional_call(net, phi, (query_x,)), query_y)
        )(phi)
        q = _conjugate_gradients(lambda v: torch.func.jvp(slope, (phi,), (v,))[1], b, data.IMAML_CG_STEPS)
        return {k: data.IMAML_STRENGTH * v for k, v in q.items()}, loss

    many = torch.vmap(one, in_dims=(None, 0, 0, 0, 0))

    def gradient():
        grads, losses = many({k: p.detach() for k, p in named.items()}, *support, *query)
        for k, p in named.items():
            p.grad = grads[k].mean(0)
        return losses.mean()

    return gradient


def _imaml_torchopt(net, work: Work, support, query):
    """As TorchOpt's example of iMAML: the solution's derivative is the module's."""
    torchopt, tasks = require("torchopt"), cut(support, query)
    # Of its own it would stop at a residual of 1e-5: the number of steps is what is fixed here.
    solver = torchopt.linear_solve.solve_cg(maxiter=data.IMAML_CG_STEPS, rtol=0.0, atol=0.0)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):
        def __init__(self, meta_net):
            super().__init__()
            self.meta_net = meta_net
            self.net = torchopt.module_clone(meta_net, by="deepcopy", detach_buffers=True)

        def forward(self, x):
            return self.net(x)

        def objective(self, x, y):
            starts = zip(self.net.parameters(), self.meta_net.parameters(), strict=True)
            pulls = sum(((p - start) ** 2).sum() for p, start in starts)
            return work.loss(self(x), y) + 0.5 * data.IMAML_STRENGTH * pulls

        def solve(self, x, y):
            params = tuple(self.net.parameters())
            optimizer = torch.optim.SGD(params, lr=work.inner_lr)
            with torch.enable_grad():
                for _ in range(work.inner_steps):
                    optimizer.zero_grad()
                    self.objective(x, y).backward(inputs=params)
                    optimizer.step()
            return self

    def gradient():
        total = torch.zeros(())
        for x, y, query_x, query_y in tasks:
            loss = work.loss(Inner(net).solve(x, y)(query_x), query_y) / len(tasks)
            loss.backward()
            total += loss.detach()
        return total

    return gradient


class Embedding(nn.Module):
    """conv4 without its mean and head, and the logarithms that are learned beside it."""

    def __init__(self, net, **logs: float):
        super().__init__()
        self.net = nn.Sequential(*net.body[:-1], nn.Flatten())
        for name, value in logs.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value).log()))


def _prototypes(module, codes, features, query):
    """Negative squared distances to the means of the classes."""
    means = codes.T @ features / codes.sum(0)[:, None]
    return -((query[:, None] - means) ** 2).sum(-1)


def _prototypes_expanded(module, codes, features, query):
    """The same with |a|² − 2ab + |b|²: fewer passes, fewer digits."""
    means = codes.T @ features / codes.sum(0)[:, None]
    return 2 * query @ means.T - (means**2).sum(1) - (query**2).sum(1, keepdim=True)


def _matching(module, codes, features, query):
    """log of the votes of the support, weighted by a softmax of cosines."""
    scores = data.COSINE_SCALE * functional.normalize(query) @ functional.normalize(features).T
    return (scores.softmax(1) @ codes).log()


def _ridge(module, codes, features, query):
    """Ridge regression to one-hot codes, in the dual."""
    n = len(features)
    kernel = features @ features.T + module.penalty.exp() * torch.eye(n)
    weights = features.T @ torch.linalg.solve(kernel, codes)
    return module.scale.exp() * query @ weights


def _ridge_cholesky(module, codes, features, query):
    """The same by a Cholesky factor."""
    kernel = features @ features.T + module.penalty.exp() * torch.eye(len(features))
    weights = features.T @ torch.cholesky_solve(codes, torch.linalg.cholesky(kernel))
    return module.scale.exp() * query @ weights


def _embedding(module, work: Work, support, query, logits: Callable):
    (task,) = cut(support, query)
    x, y, query_x, query_y = task
    codes = functional.one_hot(y).float()

    def gradient():
        loss = work.loss(logits(module, codes, module.net(x), module.net(query_x)), query_y)
        loss.backward()
        return loss.detach()

    return gradient


_EMBEDDINGS = {
    "ProtoNet": {"differences": _prototypes, "expanded distances": _prototypes_expanded},
    "MatchingNet": {"loss.backward": _matching},
    "R2-D2": {"torch.linalg.solve": _ridge, "Cholesky": _ridge_cholesky},
}


def other_ways(name: str) -> dict[str, Way]:
    """Every way of every library for one of these learners."""
    if name == "iMAML":
        return {
            "torch: loop, double backward": Way(_imaml_loop, vmapped=False),
            "torch.func: vmap, jvp of grad": Way(_imaml_vmap, vmapped=True),
            "TorchOpt: ImplicitMetaGradientModule": Way(_imaml_torchopt, vmapped=False),
        }
    return {
        f"torch: {title}": Way(partial(_embedding, logits=logits), vmapped=False)
        for title, logits in _EMBEDDINGS[name].items()
    }
