"""Learners that compare or solve, in a plane; and the networks under them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from style import BLUE, GREEN, ORANGE, RED, save

import bilevel as bl
from bilevel.train.transduction import transduction


def heads(folder: Path) -> None:
    """One 3-way 5-shot task in the plane, and how five of the learners divide the plane by it."""
    identity = bl.nets.Net(lambda key: {}, lambda params, x: x)
    makers = {
        "protonet": bl.learners.protonet(identity, 3),
        "matching_net": bl.learners.matching_net(identity, 3),
        "r2d2, ridge": bl.learners.r2d2(identity, 3),
        "metaoptnet, SVM": bl.learners.metaoptnet(identity, 3),
        "nearest_centroid": bl.learners.nearest_centroid(identity, 3),
    }
    rng = np.random.default_rng(4)
    means = np.array([[-1.1, 1.5], [0.6, 0.5], [1.7, 1.9]])
    y = np.repeat(np.arange(3), 5)
    x = means[y] + rng.normal(size=(15, 2)) * np.array([[0.75, 0.35], [0.3, 0.5], [0.6, 0.4]])[y]
    ticks = np.linspace(-3, 3, 90)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    task = bl.Task((jnp.float32(x), jnp.int32(y)), (jnp.float32(grid), jnp.zeros(len(grid), jnp.int32)))
    figure, axes = plt.subplots(1, len(makers), figsize=(12, 2.7), sharey=True)
    light = ListedColormap(["#BFDDEC", "#F7E3B5", "#BFE6DA"])
    for axis, (name, learner) in zip(axes, makers.items(), strict=True):
        assert learner.init_meta is not None and learner.predict is not None
        meta, key = learner.init_meta(jax.random.key(0)), jax.random.key(1)
        params = learner.solver.solve(learner.problem, meta, task, key).params
        logits = np.asarray(learner.predict(params, meta, task.query[0]))
        said = logits.argmax(-1).reshape(90, 90)
        axis.pcolormesh(ticks, ticks, said, cmap=light, vmin=0, vmax=2, rasterized=True)
        for label, (colour, mark) in enumerate(((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))):
            axis.plot(*x[y == label].T, mark, color=colour, mec="white", ms=6.5)
        axis.set(title=name, xticks=[-2, 0, 2], yticks=[-2, 0, 2], xlabel="feature 1", aspect="equal")
        axis.grid(visible=False)
    axes[0].set(ylabel="feature 2")
    save(figure, folder, "heads")


def nets(folder: Path) -> None:
    """Parameters of each network, and how far an answer moves with the other queries for each norm."""
    sizes = {
        "mlp 1-40-40-1": bl.nets.mlp([1, 40, 40, 1]),
        "conv4, 64 filters, 28x28": bl.nets.conv4(5, 64),
        "conv4, 64, pooling, 84x84x3": bl.nets.conv4(5, 64, image_shape=(84, 84, 3), downsample="pool"),
        "resnet12, 84x84x3": bl.nets.resnet12(5, image_shape=(84, 84, 3)),
        "transformer, 2 of 128": bl.nets.transformer(256, 128, 2, 4, 64),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 2.9))
    places = np.arange(len(sizes))[::-1]
    counts = []
    for net in sizes.values():
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        counts.append(sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)))
    left.barh(places, counts, color=BLUE, height=0.65)
    for place, count in zip(places, counts, strict=True):
        left.text(count * 1.15, place, f"{count:,}".replace(",", " "), va="center", fontsize=8.5)
    left.set(xscale="log", xlim=(500, 2e8), xlabel="parameters", yticks=places, yticklabels=list(sizes))
    left.grid(axis="y", visible=False)
    norms = {
        "NoNorm": bl.nets.NoNorm(), "BatchNorm": bl.nets.BatchNorm(), "GroupNorm(4)": bl.nets.GroupNorm(4),
        "LayerNorm": bl.nets.LayerNorm(), "SupportNorm(5)": bl.nets.SupportNorm(5),
    }  # fmt: skip
    moves = [_moves(norm) for norm in norms.values()]
    places = np.arange(len(norms))[::-1]
    right.barh(places, moves, color=[RED if move > 1e-3 else GREEN for move in moves], height=0.65)
    for place, move in zip(places, moves, strict=True):
        right.text(move + 0.03, place, f"{move:.2f}" if move > 1e-3 else "0", va="center", fontsize=8.5)
    right.set(yticks=places, yticklabels=list(norms), xlim=(0, max(moves) * 1.2))
    right.set(xlabel="how far an answer moves with the other queries,\nstandard deviations of the answers")
    right.grid(axis="y", visible=False)
    figure.tight_layout()
    save(figure, folder, "nets")


def _moves(norm) -> float:
    learner = bl.maml(bl.nets.conv4(5, 8, norm=norm), bl.learners.cross_entropy, rates=0.1)
    assert learner.init_meta is not None
    meta = learner.init_meta(jax.random.key(0))
    sample = bl.tasks.with_support(bl.tasks.Glyphs(5, 1, 4))  # the others do not mind
    return transduction(learner, meta, sample, jax.random.key(1), num_tasks=4) or 0.0


PICTURES = {"heads": heads, "nets": nets}
