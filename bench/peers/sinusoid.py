"""Times an outer step of sinusoid MAML in a peer library.

25 tasks of 10 shots and 10 queries, an MLP 1-40-40-1, inner SGD at 0.01, the exact second-order
gradient of the mean query loss, one step of Adam at 1e-3; float32. The batch is fixed.
"""

import data
from common import Work, main, parser, torch
from ways import all_ways

nn = torch.nn


def make_net(vmapped: bool = False):
    """An MLP 1-40-40-1 with ReLU, the same for every way."""
    del vmapped
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    layers = (layer for layer in net if isinstance(layer, nn.Linear))
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, data.mlp_weights(), strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return net


def make_work(inner_steps: int) -> Work:
    """The work with its fixed batch."""
    support, query = (tuple(map(torch.from_numpy, part)) for part in data.sinusoid())
    name = f"sinusoid MAML, 25 tasks, 10-shot, MLP 40-40, {inner_steps} inner step(s)"
    return Work(name, make_net, nn.functional.mse_loss, support, query, 0.01, inner_steps)


if __name__ == "__main__":
    ways = all_ways(chunks=(None,))
    args = parser(__doc__, tuple(ways)).parse_args()
    main(args, ways, make_work(args.inner_steps), images=False)
