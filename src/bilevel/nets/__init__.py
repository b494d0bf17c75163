"""Networks as init/apply pairs, fast under a batch of per-task weights and under gradients of gradients."""

from bilevel.nets.conv4 import conv4
from bilevel.nets.in_blocks import in_blocks
from bilevel.nets.mlp import mlp
from bilevel.nets.net import Net
from bilevel.nets.norms import BatchNorm, GroupNorm, LayerNorm, NoNorm, SupportNorm
from bilevel.nets.resnet12 import resnet12
from bilevel.nets.transformer import transformer

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "LayerNorm",
    "Net",
    "NoNorm",
    "SupportNorm",
    "conv4",
    "in_blocks",
    "mlp",
    "resnet12",
    "transformer",
]
