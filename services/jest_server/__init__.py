"""JEST Server's processes: selector, scorer, and what starts them together on one machine."""

from importlib.metadata import version

__version__ = version("jest-server")
