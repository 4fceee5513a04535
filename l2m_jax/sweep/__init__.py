"""Rows of a table × training seeds, over one teacher, one initial student, one ranking and one teacher store.

Only the students' own training differs between seeds (`config.student.seed`): the order of the examples, dropout, the
subsets of `random_order` and what an on-policy student samples. Data, the models that training starts from, difficulty and the sampling seeds of
the evaluation are those of the config throughout.
"""
