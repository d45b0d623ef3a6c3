"""Stands before the library of this name in processes that tests start: users do not have it."""

raise ImportError("pandas is hidden from processes that tests start (see conftest.py)")
