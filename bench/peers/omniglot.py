"""Times an outer step of Omniglot MAML in a peer library.

32 tasks, 5-way 1-shot, 15 queries a class, conv4 of 64 filters and stride 2 with batch norm by the
current batch, inner SGD at 0.4, the exact second-order gradient, one step of Adam at 1e-3; float32.
The images are random and fixed.
"""

import data
from common import Work, main, parser, torch
from ways import all_ways

nn = torch.nn


class Mean(nn.Module):
    """The mean over height and width."""

    def forward(self, x):
        return x.mean((-2, -1))


class ElementaryBatchNorm(nn.Module):
    """Batch norm by the current batch, in elementary operations.

    Under `vmap`, torch 2.13 takes a wrong second derivative of its own batch norm: the outer
    gradient is off by 0.3%, in float64 too, at inner rate 0.4. In a loop torch's own is right.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        """Normalizes x [n, channels, height, width] over all axes but the channels."""
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        return (x - mean) * scale + self.bias[:, None, None]


def make_net(vmapped: bool = False, conv_bias: bool = True, filters: int = 64, ways: int = 5):
    """conv4: four blocks of convolution, batch norm and ReLU, then a linear layer.

    The bias of the convolutions has no effect before a batch norm.
    """
    blocks, (weight, bias) = data.conv4_weights(filters, ways)
    layers = []
    with torch.no_grad():
        for kernel, shift in blocks:
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, stride=2, padding=1, bias=conv_bias)
            conv.weight.copy_(torch.from_numpy(kernel))
            if conv_bias:
                conv.bias.copy_(torch.from_numpy(shift))
            norm = (
                ElementaryBatchNorm(kernel.shape[0])
                if vmapped
                else nn.BatchNorm2d(kernel.shape[0], track_running_stats=False)
            )
            layers += [conv, norm, nn.ReLU()]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    return nn.Sequential(*layers, Mean(), linear)


def make_work(inner_steps: int) -> Work:
    """The work with its fixed batch."""
    support, query = (tuple(map(torch.from_numpy, part)) for part in data.omniglot())
    name = f"Omniglot MAML, 32 tasks, 5-way 1-shot, conv4, {inner_steps} inner step(s)"
    return Work(name, make_net, nn.functional.cross_entropy, support, query, 0.4, inner_steps)


if __name__ == "__main__":
    ways = all_ways(chunks=(None, 4))
    args = parser(__doc__, tuple(ways)).parse_args()
    main(args, ways, make_work(args.inner_steps), images=True)
