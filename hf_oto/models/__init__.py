"""
What a model is made of, and what it is after a cut: the table of families and the pruned classes (the two files
that travel with every checkpoint and import nothing of `hf_oto`), zero-invariant groups, surgery. It may import
`config`.
"""
