"""Experts spread over ranks: dispatchers, their collectives and their memory."""
