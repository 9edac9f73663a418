"""Faults: small, plausible mistakes, each put into a backend's source on purpose, to see whether the suite notices."""
