"""Measurements: every figure the project quotes comes from here."""
