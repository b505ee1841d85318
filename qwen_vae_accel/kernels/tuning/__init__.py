"""Tile configurations: the keys, the tables that ship, measuring, choosing and keeping them."""
