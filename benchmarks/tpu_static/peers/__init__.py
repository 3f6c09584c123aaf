"""Kernels of other libraries, one adapter a file: the same work, in that library's own layout.

Each is called as its library's users call it, with the tile sizes that were found best for these
works; its necessary bytes are those of what it does (`Program.writes_cache`).
"""
