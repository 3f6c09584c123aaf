"""Other libraries' attention kernels for GPUs, one a file."""
