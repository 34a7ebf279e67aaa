"""``--mode test``: each metric is a module with a function ``measure``, named in ``config.options.METRICS``."""
