"""Small tools without a subject: files, command lines, the terminal, versions of packages, threads, seconds by phase.

Everything may use them.

May import types.
"""
