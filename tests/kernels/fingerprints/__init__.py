"""Hashes of everything that the kernels hand to a GPU: launches, places in memory, packed weights, machine code.

A change that only moves or renames code leaves all of them as recorded. See ``__main__.py`` for the command.
"""
