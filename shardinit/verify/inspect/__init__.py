"""Weights looked at before they exist: their statistics, from windows."""
