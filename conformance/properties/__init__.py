"""The properties, one module per clause of SPEC.md: `test_static.py` holds the clause STATIC."""
