"""Bitlayers by layer: what `pbjax.allocate` and `pbjax.product_seconds` are made of.

`allocate` takes what users ask for and `outcome` is what they get. In between `search` proposes allocations, by the
knapsack of `front` from errors that `sensitivity` measures and `costs`, some of them times from `seconds`; `layers` are
what all of them count by.
"""
