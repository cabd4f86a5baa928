"""Measurements, each one command; results are committed with machine and date."""
