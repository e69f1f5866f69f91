"""Hypergradient estimators: their cost, their bias, and other libraries beside them."""
