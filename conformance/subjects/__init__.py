"""Subjects that ship with the suite: modules of real models, judged through the protocol as users run them.

They are found by name as backends are (entry points `lyra.subjects`), and judged where they are named:
`lyra conform --backend torch-module --backend jax-module`.
"""
