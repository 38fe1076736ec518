"""Shipped recipes and their strict loader."""
