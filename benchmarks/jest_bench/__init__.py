"""Measurements that the figures in the documentation come from, for anyone to repeat."""
