"""Runs and benchmark records as one self-contained HTML page."""
