"""The bitlayer product: one contract, one file per backend."""
