"""Small tools without a subject: files, command lines, versions of packages, threads, seconds by phase.

Anything may use them; they use nothing of the project but `types`.
"""
