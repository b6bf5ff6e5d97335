"""Train Mixture-of-Experts language models with a router you choose, and see what that choice costs."""

__version__ = "0.1.0"
