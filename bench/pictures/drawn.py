"""Tasks and pictures as they are: what the samplers draw, what augmentation does, what is converted."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from style import BLUE, GREEN, ORANGE, RED, pictures, save

import bilevel as bl
from bilevel.tasks import augment

KEY = jax.random.key(3)
DRAW, COVER = jax.random.key(273), jax.random.key(12)  # of the augmentation: draws that show each operation


def tasks(folder: Path) -> None:
    """One or more tasks of every sampler that needs no data."""
    figure = plt.figure(figsize=(11, 6.4))
    top = figure.add_gridspec(2, 12, hspace=0.42, wspace=1.0)
    regressions = {
        "sinusoid": lambda key: bl.tasks.sinusoid(key, queries=200),
        "harmonics": lambda key: bl.tasks.harmonics(key, queries=400, noise=0.05),
        "GaussianProcess('rbf')": bl.tasks.GaussianProcess(queries=200),
        "GaussianProcess('matern12')": bl.tasks.GaussianProcess("matern12", queries=200),
    }
    for place, (name, sample) in enumerate(regressions.items()):
        compiled = jax.jit(sample)
        axis = figure.add_subplot(top[0, 3 * place : 3 * place + 3])
        for seed, colour, mark in ((0, BLUE, "o"), (1, ORANGE, "s"), (5, GREEN, "^")):
            task = compiled(jax.random.key(seed))
            x, y = (np.asarray(part)[:, 0] for part in task.query)
            order = np.argsort(x)
            axis.plot(x[order], y[order], color=colour, lw=1)
            axis.plot(*(np.asarray(part)[:, 0] for part in task.support), mark, color=colour, ms=4)
        axis.set(title=name, xlabel="x")
        axis.set_ylabel("y", labelpad=0) if place == 0 else None
    axis = figure.add_subplot(top[1, :4])
    task = jax.jit(bl.tasks.Glyphs(5, 1, 3, "test"))(KEY)
    order = np.argsort(task.query[1], kind="stable")
    query = np.asarray(task.query[0])[order].reshape(5, 3, 28, 28)
    order = np.argsort(task.support[1])
    support = np.asarray(task.support[0])[order].reshape(5, 1, 28, 28)
    pictures(axis, np.concatenate([support, query], 1).transpose(1, 0, 2, 3))
    axis.set_title("Glyphs(5, 1, 3): a class a column,\nsupport on top, three queries below")
    axis = figure.add_subplot(top[1, 4:8])
    sheet = []
    for shots in (30, 100, 300):
        task = jax.jit(bl.tasks.ImageCompletion(shots=shots, query="all"))(jax.random.key(7))
        known = np.full((28, 28), 0.35)
        sheet.append((_fill(known, *task.support), _fill(np.zeros((28, 28)), *task.query)))
    pictures(axis, np.array(sheet).transpose(1, 0, 2, 3))
    axis.set_title("ImageCompletion: 30, 100, 300 pixels\nare known, all are asked for")
    axis = figure.add_subplot(top[1, 9:])
    sampler = _varying()
    counts = []
    for labels in np.asarray(jax.jit(bl.tasks.batch(sampler, 12))(KEY).support[1]):
        counts.append(np.bincount(labels[labels >= 0], minlength=10))
    below = np.zeros(12)
    for count in np.array(counts).T:
        axis.bar(np.arange(12), count, bottom=below, width=0.8, edgecolor="white", lw=0.8, color=BLUE)
        below += count
    axis.set(
        title="VaryingFewShot: 12 tasks,\na segment is a class", xlabel="task", ylabel="support examples"
    )
    axis.grid(axis="x", visible=False)
    save(figure, folder, "tasks")


def _fill(picture: np.ndarray, places, values) -> np.ndarray:
    at = np.rint((np.asarray(places) + 1) / 2 * 27).astype(int)
    picture[at[:, 0], at[:, 1]] = np.asarray(values)[:, 0]
    return picture


def _varying():
    source = bl.tasks.FewShot(np.zeros((400, 4), np.float32), np.arange(400) % 20, ways=2, shots=1, queries=2)
    return bl.tasks.VaryingFewShot(source, ways=(3, 10), shots=bl.tasks.UnequalShots(1, 6))


def augmentation(folder: Path) -> None:
    """One character under every operation of `bl.tasks.augment`, at growing strength."""
    character = jax.jit(jax.vmap(bl.tasks.glyph))(jnp.array([12]), KEY[None]).reshape(1, 28, 28, 1)
    operations = {
        "shift": (lambda x, key, s: augment.affine(x, key, shift=s), (0, 0.03, 0.06, 0.1, 0.15, 0.2)),
        "rotation": (lambda x, key, s: augment.affine(x, key, rotation=s), (0, 0.1, 0.2, 0.4, 0.7, 1.0)),
        "scale": (lambda x, key, s: augment.affine(x, key, scale=s), (0, 0.1, 0.2, 0.3, 0.45, 0.6)),
        "shear": (lambda x, key, s: augment.affine(x, key, shear=s), (0, 0.1, 0.2, 0.4, 0.6, 0.9)),
        "noise": (lambda x, key, s: augment.noise(x, key, strength=s), (0, 0.05, 0.1, 0.2, 0.3, 0.5)),
        "contrast": (lambda x, key, s: augment.intensity(x, key, contrast=s), (0, 0.3, 0.6, 1, 1.5, 2)),
        "cutout": (lambda x, key, s: augment.cutout(x, COVER, size=s), (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
    }
    rows = []
    for change, strengths in operations.values():
        drawn = jax.jit(lambda s, change=change: jax.vmap(lambda s: change(character, DRAW, s))(s))
        rows.append(np.asarray(drawn(jnp.array(strengths, jnp.float32)))[:, 0, ..., 0])
    figure, axis = plt.subplots(figsize=(6.4, 6.9))
    pictures(axis, np.array(rows))
    for row, (name, (_, strengths)) in enumerate(operations.items()):
        axis.text(-3, 30 * row + 14, name, ha="right", va="center")
        for column, strength in enumerate(strengths):
            axis.text(30 * column + 1.5, 30 * row + 3.2, f"{strength:g}", fontsize=7.5, color=RED)
    axis.set_title("One draw at growing strength (in red)")
    save(figure, folder, "augmentation")


def data(folder: Path) -> None:
    """Class folders of pictures of many sizes, converted both ways, and a task of what was stored."""
    rng = np.random.default_rng(0)
    drawn = jax.jit(jax.vmap(bl.tasks.glyph))(jnp.arange(80) // 4, jax.random.split(KEY, 80))
    drawn = np.asarray(drawn).reshape(20, 4, 28, 28)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "mine"
        originals = []
        for number in range(20):
            (source / f"class_{number:02}").mkdir(parents=True)
            for copy in range(4):
                picture = _page(drawn[number, copy], number, rng)
                Image.fromarray(picture).save(source / f"class_{number:02}" / f"{copy}.png")
                originals += [picture] if copy == 0 and number < 4 else []
        for fit in ("stretch", "crop"):
            bl.tasks.convert(source, Path(name) / fit, bl.tasks.Layout(28, fit=fit), splits="14/3/3")
        kept = {fit: _first(bl.tasks.open_stored(Path(name) / fit)) for fit in ("stretch", "crop")}
        task = bl.tasks.stored("train", 5, 1, 2, Path(name) / "crop")(jax.random.key(2))
    figure = plt.figure(figsize=(10, 3.4))
    grid = figure.add_gridspec(2, 12, wspace=0.3, hspace=0.1)
    for place, picture in enumerate(originals):
        axis = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.set_title(f"{picture.shape[1]} x {picture.shape[0]}", fontsize=9)
    axis = figure.add_subplot(grid[1, :8])
    pictures(axis, 1 - np.concatenate([kept["stretch"], kept["crop"]])[None] / 255)
    axis.set_title("28 x 28: the same four by --fit stretch, then by --fit crop", y=-0.35, fontsize=9)
    axis = figure.add_subplot(grid[:, 9:])
    x, order = np.asarray(task.query[0]), np.argsort(task.query[1], kind="stable")
    shown = np.concatenate([np.asarray(task.support[0])[np.argsort(task.support[1])][:, None],
                            x[order].reshape(5, 2, 28, 28, 1)], 1)  # fmt: skip
    pictures(axis, 1 - shown[..., 0])
    axis.set_title("a 5-way 1-shot task of it:\nsupport, then two queries", fontsize=9)
    save(figure, folder, "data")


def _first(stored) -> np.ndarray:
    """The first picture of each of the classes that were drawn first, in bytes `[4, 28, 28]`."""
    places = [stored.names.index(f"class_{number:02}") for number in range(4)]
    return np.stack([np.asarray(stored.images)[stored.labels == place][0, ..., 0] for place in places])


def _page(drawn: np.ndarray, number: int, rng) -> np.ndarray:
    """A drawn character somewhere on a page of random proportions, dark on light, as bytes."""
    height, width = [(56, 84), (84, 56), (56, 100), (70, 70)][number % 4]
    page = np.zeros((height, width))
    big = np.kron(drawn, np.ones((2, 2)))
    down, right = (height - 56) // 2, (width - 56) // 2
    page[down : down + 56, right : right + 56] = big
    return (255 - 255 * np.clip(page + 0.03 * rng.normal(size=page.shape), 0, 1)).astype(np.uint8)


PICTURES = {"tasks": tasks, "augmentation": augmentation, "data": data}
