"""bilevel's side of learner_steps.py: an outer step of a few-shot learner inside bl.train, timed when asked.

Weights and batches are those of bench/peers/data.py. Prints a JSON line with the outer losses of the first
and the third step when it has compiled, then one for each line that it reads.
"""

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ours import conv4_weights, fixed

import bilevel as bl
from bilevel.learners.cavia import FilmContext, cavia
from bilevel.learners.imaml import imaml
from bilevel.learners.maml_plus_plus import maml_plus_plus, split_norms
from bilevel.learners.matching_net import matching_net
from bilevel.learners.protonet import protonet
from bilevel.learners.r2d2 import r2d2
from bilevel.learners.reptile import reptile

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import data
import turns

ADAM = optax.adam(1e-3, eps=data.EPSILON)


@dataclass(frozen=True)
class Row:
    """A learner of the table.

    Args:
        make: `make(net, sizes) -> Learner`.
        meta: `meta(parameters of the net, sizes) -> θ`.
        task_chunk: tasks computed side by side on a device, at most those there are.
        chunk_size: outer steps a compiled call; more where a step is short.
        optimizer: the outer one.
    """

    make: Callable
    meta: Callable = lambda init, sizes: {"init": init}
    task_chunk: int = 1
    chunk_size: int = 10
    optimizer: optax.GradientTransformation = ADAM


LOSS = bl.learners.cross_entropy


def maml(rates: Callable = bl.learners.Fixed, **options) -> Callable:
    """MAML with options."""
    return lambda net, sizes: bl.maml(
        net,
        LOSS,
        num_steps=sizes.inner_steps,
        rates=rates(sizes.rate),
        **options,
    )


def plus_plus_meta(init, sizes):
    """Every step has its rates and norms."""
    init, norm = split_norms(init)
    norms = jax.tree.map(lambda leaf: np.stack([leaf] * (sizes.inner_steps + 1)), norm)
    rates = bl.learners.PerLayerPerStep(sizes.rate).init(init, sizes.inner_steps)
    return {"init": init, "norm": norms, "rates": rates}


def cavia_meta(net, sizes):
    """The network, and the matrices that a context is multiplied with."""
    return {"net": net, "film": dict(zip("uv", data.film_weights(sizes.filters), strict=True))}


def logs(**values):
    """What is learned as a logarithm, beside the embedding."""
    return lambda init, sizes: {
        "embed": init,
        **{f"log_{name}": np.float32(math.log(value)) for name, value in values.items()},
    }


ROWS = {
    "MAML": Row(maml()),
    "FOMAML": Row(maml(estimator=bl.hypergrad.FirstOrder())),
    "ANIL": Row(maml(adapt="head"), chunk_size=50),
    "BOIL": Row(maml(adapt=bl.learners.AllBut("head"))),
    "Meta-SGD": Row(
        maml(bl.learners.PerParameter),
        lambda init, sizes: {
            "init": init,
            "rates": jax.tree.map(lambda leaf: np.full_like(leaf, sizes.rate), init),
        },
    ),
    "MAML++": Row(
        lambda net, sizes: maml_plus_plus(
            net,
            LOSS,
            num_steps=sizes.inner_steps,
            rate=sizes.rate,
            multi_step_annealing=0,  # the loss of every step counts alike, all the time
            first_order_steps=0,
        ),
        plus_plus_meta,
    ),
    "Reptile": Row(
        lambda net, sizes: reptile(
            net,
            LOSS,
            num_steps=sizes.inner_steps,
            optimizer=optax.adam(sizes.rate, b1=0.0, eps=data.EPSILON),
        ),
        optimizer=optax.sgd(1.0),
    ),
    "iMAML": Row(
        lambda net, sizes: imaml(
            net,
            LOSS,
            num_steps=sizes.inner_steps,
            rate=sizes.rate,
            strength=data.IMAML_STRENGTH,
            estimator=bl.hypergrad.Implicit(bl.hypergrad.cg(data.IMAML_CG_STEPS)),
        )
    ),
    "CAVIA": Row(
        lambda net, sizes: cavia(
            net,
            LOSS,
            context=FilmContext(data.CONTEXT, "block_2"),
            num_steps=sizes.inner_steps,
            rate=sizes.rate,
        ),
        cavia_meta,
    ),
    "ProtoNet": Row(lambda net, sizes: protonet(net, sizes.ways), logs()),
    "MatchingNet": Row(
        lambda net, sizes: matching_net(net, sizes.ways, scale=data.COSINE_SCALE),
        logs(),
    ),
    "R2-D2": Row(
        lambda net, sizes: r2d2(net, sizes.ways, scale=data.RIDGE_SCALE),
        logs(penalty=1.0, scale=data.RIDGE_SCALE),
    ),
}


def problem_of(name: str, sizes: data.Sizes) -> tuple[bl.Learner, dict, bl.Task]:
    """The learner, θ and the fixed tasks."""
    row = ROWS[name]
    embeds = sizes.inner_steps == 0
    init = conv4_weights(sizes.filters, sizes.ways)
    if embeds:
        del init["head"]
    net = bl.nets.conv4(None if embeds else sizes.ways, sizes.filters)
    parts = data.batches(sizes)
    tasks = bl.Task(*((np.moveaxis(x, 2, -1), y.astype(np.int32)) for x, y in parts))
    learner, meta = row.make(net, sizes), row.meta(init, sizes)
    return learner, *jax.tree.map(jnp.asarray, (meta, tasks))


class Turns:
    """What bl.train calls after every chunk: times chunks when asked, and ends the training with the input.

    Args:
        hello: said after two chunks, of which the second compiles nothing and tells how long a turn is.
    """

    def __init__(self, hello: dict, chunk_size: int, out):
        self.hello, self.chunk_size, self.out = hello, chunk_size, out
        self.chunks, self.walls, self.start = 0, [], 0.0

    def __call__(self, state, values) -> bool:
        """True where no more turns are asked for."""
        self.walls.append(1e3 / values["steps_per_second"])
        if self.chunks == 0:
            if len(self.walls) == 1:  # it has compiled, or read the program that was
                return False
            self.chunks = turns.repeats(self.walls[1] * self.chunk_size)
            turns.say(self.hello, self.out)
        elif len(self.walls) == self.chunks:
            each = (time.process_time() - self.start) / (self.chunks * self.chunk_size)
            turns.say(turns.figures(self.walls, 1e3 * each), self.out)
        else:
            return False
        self.walls.clear()
        more = turns.asked()
        self.start = time.process_time()
        return not more


def serve(args, sizes: data.Sizes, out) -> None:
    """Takes three steps one by one for their losses, then trains for as long as turns are asked for."""
    learner, meta, tasks = problem_of(args.learner, sizes)
    row, sample = ROWS[args.learner], fixed(tasks)
    optimizer, chunk_size = row.optimizer, row.chunk_size
    state, losses = bl.init_state(learner, optimizer, sample, jax.random.key(0), meta), []

    def train(state, num_meta_steps, on_chunk):
        options = bl.Options(chunk_size=chunk_size, task_chunk=args.task_chunk, devices=args.devices)
        return bl.train(
            learner, optimizer, sample, state, num_meta_steps, options=options, on_chunk=[on_chunk]
        )

    for step in (1, 2, 3):
        state = train(state, step, lambda state, values: losses.append(values["outer_loss"]))
    way = f"task_chunk={args.task_chunk}, devices={args.devices}"
    hello = {"value": losses[0], "third_value": losses[2], "way": way, "jax": jax.__version__}
    train(state, 10**9, Turns(hello, chunk_size, out))


def main() -> None:
    """Serves until the input ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("learner", choices=tuple(ROWS))
    options.add_argument("--small", action="store_true", help="few filters and tasks, to try it out")
    options.add_argument("--devices", type=int, default=2, help="that a step's tasks are spread over")
    options.add_argument("--task-chunk", type=int, help="in place of the learner's own")
    args = options.parse_args()
    sizes = data.sizes(args.learner, args.small)
    args.devices = min(args.devices, sizes.num_tasks)
    each = -(-sizes.num_tasks // args.devices)  # tasks on a device
    args.task_chunk = min(args.task_chunk or ROWS[args.learner].task_chunk, each)
    jax.config.update("jax_num_cpu_devices", args.devices)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as cache:
        # Each bl.train compiles the same program: all but the first read it.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        serve(args, sizes, out)


if __name__ == "__main__":
    main()
