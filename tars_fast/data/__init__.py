"""Spoken questions, from wherever they are.

Comes in: a path or name, recordings, written questions. Goes out: `Question`s, and waves of audio. Imports support only.
"""
