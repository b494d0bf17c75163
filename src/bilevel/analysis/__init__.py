"""Questions about a hypergradient on your own problem: is it right, which is best, does it fit."""

from bilevel.analysis.advise import Advice, Trial, advise
from bilevel.analysis.check import check
from bilevel.analysis.check_report import CheckReport, LeafReport
from bilevel.analysis.influence import Influence, influence, precision_at, weighted_rows
from bilevel.analysis.memory import Memory, parse_memory
from bilevel.analysis.plan import Plan, plan
from bilevel.analysis.second_order import Finding, find_operations

__all__ = [
    "Advice",
    "CheckReport",
    "Finding",
    "Influence",
    "LeafReport",
    "Memory",
    "Plan",
    "Trial",
    "advise",
    "check",
    "find_operations",
    "influence",
    "parse_memory",
    "plan",
    "precision_at",
    "weighted_rows",
]
