"""Sweeps: rows of a table × training seeds or worlds, and contrasts between rows.

A training seed (`config.student.seed`) redraws only the student's training: the order of the examples, dropout, the
subsets of `random_order`, and what an on-policy student samples. Data, initial models, difficulty and the sampling
seeds of the evaluation are the same in all runs.

A world (`config.world`) redraws the training rows, the initial student and its ranking too. The rows of one world share
all of these, so that their differences are paired.
"""
