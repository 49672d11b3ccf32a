"""Every rule that isoscale ships; importing this fills the table."""

from isoscale.scalify.rules import arithmetic, layout, matmul, reduce

__all__ = ["arithmetic", "layout", "matmul", "reduce"]
