"""Fixtures of several unit tests."""

from tests.upstream import index, own

__all__ = ["index", "own"]
