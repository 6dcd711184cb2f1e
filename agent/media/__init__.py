"""Finds the metadata of media files without decoding them: a cleaned file consists of ranges of the original.

Why no library: docs/decisions/0018-metadata-without-decoding.md
"""
