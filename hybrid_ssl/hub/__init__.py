"""Encoders that leave a run, and encoders that come in."""
