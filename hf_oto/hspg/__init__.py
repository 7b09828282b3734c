"""
Which groups go, and how: the optimizer, saliency, budget and schedule. It may import torch, `models.groups` and
`config`, so that the optimizer works in a bare training loop.
"""
