"""Metrics with sum-reduced state."""

from moe_lightning.metrics.expert_load import ExpertLoad, ExpertLoadSummary

__all__ = ["ExpertLoad", "ExpertLoadSummary"]
