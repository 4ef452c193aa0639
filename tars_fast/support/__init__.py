"""Small tools without a subject: files, command lines, versions of packages, threads, seconds by phase.

Everything may use them.

May import types.
"""
