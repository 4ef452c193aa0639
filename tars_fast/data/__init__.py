"""Where spoken questions come from, and how they are checked, split and synthesised.

Comes in: a path or a name on the hub, recordings, written questions. Goes out: `Question`s, and decoded waves.

May import support.
"""
