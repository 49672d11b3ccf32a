"""isoscale: tune a small model once, train any bigger one in fewer bits, and know why every number is what it is."""
