"""Arithmetic that is not in Python's standard library."""
from __future__ import annotations


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
