"""Measuring a trained model (``--mode test``).

Each metric is a module with a function ``measure``; ``config.options.METRICS`` has their names.
"""
