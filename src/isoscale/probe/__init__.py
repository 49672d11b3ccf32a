"""Looks and never changes: scales at the sites of a model, the first tensor that stopped being a number."""

from isoscale.probe.first_bad import first_bad
from isoscale.probe.scales import SiteScale, site_scales

__all__ = ["SiteScale", "first_bad", "site_scales"]
