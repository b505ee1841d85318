"""Compiled engines: the store on disk and the runtime that loads them when they are needed."""
