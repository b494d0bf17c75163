"""Questions about a hypergradient on your own problem: is it right, which is best, does it fit."""

from bilevel.analysis.check import check
from bilevel.analysis.check_report import CheckReport, LeafReport
from bilevel.analysis.second_order import Finding, find_operations

__all__ = ["CheckReport", "Finding", "LeafReport", "check", "find_operations"]
