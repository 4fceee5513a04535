"""Sweeps: rows of a table × training seeds, with one teacher, initial student, ranking and teacher store.

The seed (`config.student.seed`) changes only the students' training: the order of the examples, dropout, the subsets of
`random_order`, and what an on-policy student samples. Data, initial models, difficulty and the sampling seeds of the
evaluation are the same in all runs.
"""
