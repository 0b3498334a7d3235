"""The fused kernels behind the losses, and the operators that wrap them."""
