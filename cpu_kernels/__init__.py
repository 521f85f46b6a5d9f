"""The product of bitlayers in C++, called by XLA on the CPU; arrays in, arrays out, as in `pallas_kernels`."""
