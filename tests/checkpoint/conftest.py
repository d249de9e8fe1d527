"""The small networks of the surgery tests."""

from surgery.conftest import nets

__all__ = ["nets"]
