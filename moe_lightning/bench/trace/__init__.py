"""Traces of torch.profiler: made of a layer's calls, and read."""
