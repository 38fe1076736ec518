"""Modules that stand where attention stood: one file per mixer."""
