"""Fixed batches and initial weights in numpy alone, so that another library can time the same."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """The work of a learner's outer step: its tasks, its inner steps and their rate."""

    num_tasks: int = 16
    shots: int = 1
    queries: int = 1
    ways: int = 5
    inner_steps: int = 1
    rate: float = 0.4
    filters: int = 64
    noise: float = 0.3  # over the pictures; without enough of it a loss is 0, and says nothing


ONE_LARGE = Sizes(num_tasks=1, queries=5, ways=20, inner_steps=0, noise=3.0)

# Sizes as the recipes train, where they are not so large that a benchmark would take long.
LEARNERS = {
    "MAML": Sizes(),
    "FOMAML": Sizes(),
    "ANIL": Sizes(inner_steps=5),
    "BOIL": Sizes(),
    "Meta-SGD": Sizes(),
    "MAML++": Sizes(num_tasks=4, inner_steps=5, rate=0.1),
    "Reptile": Sizes(num_tasks=5, shots=2, inner_steps=5, rate=1e-3),
    "iMAML": Sizes(num_tasks=4, inner_steps=5, rate=0.005),
    "CAVIA": Sizes(inner_steps=2, rate=1.0),
    "ProtoNet": ONE_LARGE,
    "MatchingNet": ONE_LARGE,
    "R2-D2": ONE_LARGE,
}


def sizes(learner: str, small: bool = False) -> Sizes:
    """The work of a learner, or one that shows in seconds whether all compute the same."""
    whole = LEARNERS[learner]
    return replace(whole, num_tasks=min(2, whole.num_tasks), filters=8) if small else whole


def batches(sizes: Sizes):
    """The support and query sets of a learner's tasks."""
    return omniglot(sizes.num_tasks, sizes.ways, sizes.shots, sizes.queries, sizes.noise)


# 2.0 is published. Here the loss has curvatures down to -26, and where a system is not positive definite
# conjugate gradients stop in bilevel and go on elsewhere: with 100 all do the same work.
IMAML_STRENGTH, IMAML_CG_STEPS = 100.0, 5
# Of every Adam. With the usual 1e-8 an element that is nothing but rounding moves by a whole step, and two
# right answers are 4e-3 apart after two steps.
EPSILON = 1e-3
CONTEXT = 100  # CAVIA's numbers
COSINE_SCALE = 10.0  # MatchingNet's
RIDGE_SCALE = 5.0  # R2-D2's of the logits; its penalty starts at 1


def dense(rng, fan_in: int, fan_out: int):
    """Weight [fan_out, fan_in] and bias [fan_out], uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    weight = rng.uniform(-bound, bound, (fan_out, fan_in))
    return weight.astype(np.float32), rng.uniform(-bound, bound, fan_out).astype(np.float32)


def sinusoid(num_tasks: int = 25, shots: int = 10, queries: int = 10):
    """Support and query sets: x and y of shape [num_tasks, shots or queries, 1]."""
    rng = np.random.default_rng(0)
    amplitude = rng.uniform(0.1, 5.0, (num_tasks, 1, 1))
    phase = rng.uniform(0.0, np.pi, (num_tasks, 1, 1))
    x = rng.uniform(-5.0, 5.0, (num_tasks, shots + queries, 1))
    y = amplitude * np.sin(x - phase)
    x, y = x.astype(np.float32), y.astype(np.float32)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def mlp_weights():
    """Three layers 1-40-40-1, a pair of weight [out, in] and bias [out] each."""
    rng = np.random.default_rng(1)
    return [dense(rng, *sizes) for sizes in ((1, 40), (40, 40), (40, 1))]


def omniglot(num_tasks: int = 32, ways: int = 5, shots: int = 1, queries: int = 15, noise: float = 0.3):
    """Random images [num_tasks, ways * n, 1, 28, 28] and labels [num_tasks, ways * n], twice."""
    rng = np.random.default_rng(0)

    def part(count):
        labels = np.tile(np.repeat(np.arange(ways), count), (num_tasks, 1))
        # An image is its class's picture under noise, so that adaptation has something to learn.
        images = pictures[np.arange(num_tasks)[:, None], labels]
        return (images + noise * rng.random(images.shape)).astype(np.float32), labels

    pictures = (rng.random((num_tasks, ways, 1, 28, 28)) < 0.15).astype(np.float32)
    return part(shots), part(queries)


def conv4_weights(filters: int = 64, ways: int = 5):
    """Four blocks of weight [out, in, 3, 3] and bias [out], then a dense pair [ways, filters].

    The scale and shift of each batch norm start at 1 and 0.
    """
    rng = np.random.default_rng(1)
    blocks = []
    for channels in (1, filters, filters, filters):
        weight, bias = dense(rng, channels * 9, filters)
        blocks.append((weight.reshape(filters, channels, 3, 3), bias))
    return blocks, dense(rng, filters, ways)


def film_weights(filters: int = 64, context: int = CONTEXT):
    """U and V of CAVIA, [filters, context] each, normal with variance 1 / context."""
    rng = np.random.default_rng(2)
    return [(rng.standard_normal((filters, context)) * context**-0.5).astype(np.float32) for _ in range(2)]
