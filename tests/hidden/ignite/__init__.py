"""Stands before the library of this name in processes that tests start: users do not have it."""

raise ImportError("ignite is hidden from processes that tests start (see conftest.py)")
