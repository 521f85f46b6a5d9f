"""Array-level kernels of pbjax: arrays in, arrays out. Knows no pytree, no module, no model."""
