"""The ``rsgwm`` command: parse, build a config, call one function, print."""
