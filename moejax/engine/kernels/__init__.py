"""The kernels of a decode step, in Pallas for Triton: they run on NVIDIA GPUs from Ampere on."""
