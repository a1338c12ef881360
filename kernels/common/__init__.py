"""What the operations share: segments, first derivatives made by hand, and how compiled kernels are looked into."""
