"""Training on text: read it, cut it into windows, train on it, and say in bits per byte what was learned.

Importing this package imports none of its files, so that a wrong path is reported before a heavy library is loaded.
"""
