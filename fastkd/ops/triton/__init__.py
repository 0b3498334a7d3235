"""The Triton kernels. Import nothing of this folder before ``runtime`` has said that Triton can run."""
