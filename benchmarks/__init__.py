"""Measurements of this project: each module prints figures, none asserts anything."""
