"""Figures for people: pages, pictures, tables on the terminal, the log of a run.

Comes in: results, analyses, metrics. Goes out: html, png, text.

May import support, data, models, learning, evaluation, analysis.
"""
